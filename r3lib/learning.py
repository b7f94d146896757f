"""The learning pass: what GRPO computes of a step's rows, each token once and none for nothing.

What depends on TRL's private names for it is here.
"""

import logging
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from trl import GRPOTrainer

from .errors import R3Error
from .shared_prefix import difference, packed_values, unpackable, whole_groups

logger = logging.getLogger(__name__)


class SharedPrefixGRPO(GRPOTrainer):
    """GRPO with the prompt of a group computed once, and nothing for rows that teach nothing.

    Same loss and gradients as TRL's, but for what is taken within a learning batch, which here has
    whole groups: `entropy_coef`, `top_entropy_quantile`.

    A subclass sets `_packs` (see `_check_packing`), `_reach`, `_spread` and `failures`.
    """

    _packs = False  # whether the rows of a group are computed as one
    _rows: list[int] | None = None  # those that the next forward computes; None: all

    def _prepare_inputs(self, generation_batch):
        """TRL's, with the rows of a group, which it shuffles, in one learning batch again."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = whole_groups(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model, inputs):
        """TRL's, without a forward for rows whose loss and gradient are exactly zero."""
        self._rows = self._rows_that_teach(inputs)
        loss = super()._compute_loss(model, inputs)
        if self._rows == []:  # nothing was computed that has an entropy
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["entropy"].pop()
            if not self._metrics[mode]["entropy"]:
                del self._metrics[mode]["entropy"]
        self._rows = None
        return loss

    def _rows_that_teach(self, inputs) -> list[int] | None:
        """The rows with an advantage, where all others have no part in the loss; None: all rows."""
        args = self.args
        of_entropy = self._entropy_bonus_enabled or args.top_entropy_quantile < 1.0
        all_matter = args.beta or of_entropy or self.aux_loss_enabled
        if all_matter or not self._packs or "old_per_token_logps" in inputs:
            return None
        teaching = inputs["advantages"].reshape(len(inputs["completion_mask"]), -1).any(1)
        rows = (teaching & inputs["completion_mask"].any(1)).nonzero()[:, 0].tolist()
        if not rows and self.accelerator.num_processes > 1:  # whose gradients are awaited
            return [0]
        return rows

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **options
    ):
        """TRL's, with the prompt of a group computed once (see `shared_prefix`)."""
        if not self._packs or options.get("compute_aux_loss"):
            return self._separate_values(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **options
            )
        rows = list(range(len(input_ids))) if self._rows is None else self._rows
        if not rows:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            zero = sum((p * 0).sum() for p in trained).float()
            logps = zero.expand(len(input_ids), logits_to_keep)
            return logps, logps.detach(), None
        several = self.accelerator.num_processes > 1
        with self._autocast():
            logps, entropies = packed_values(
                model, self._backbone(model), input_ids, attention_mask, logits_to_keep, rows,
                batch_size or (len(rows) if several else None), several,
            )  # fmt: skip
        if self._rows is not None:  # TRL logs the mean over all rows: make it that of these
            tokens = attention_mask[rows, -logits_to_keep:]
            mean = (entropies[rows] * tokens).sum() / tokens.sum()
            skipped = torch.ones(len(input_ids), 1, dtype=torch.bool, device=mean.device)
            skipped[rows] = False
            entropies = torch.where(skipped, mean.detach(), entropies)
        return logps, entropies, None

    @contextmanager
    def _autocast(self, learning: bool = True):
        """Accelerate's; plain LoRA then need not cast to fp32 what autocast casts back to 16 bits.

        Within the block a trained weight is cast once. Checkpointing, which computes LoRA again
        beyond the block, needs it as it is there.
        """
        with self.accelerator.autocast():
            again = self.accelerator.unwrap_model(self.model).is_gradient_checkpointing and learning
            uncast = torch.is_autocast_enabled(self.model.device.type) and not again
            layers = [m for m in self.model.modules() if uncast and isinstance(m, LoraLayer)]
            layers = [layer for layer in layers if not layer.lora_variant]
            for layer in layers:
                layer.cast_input_dtype_enabled = False
            try:
                yield
            finally:
                for layer in layers:
                    layer.cast_input_dtype_enabled = True

    def _backbone(self, model):
        """The part of `model` that gives hidden states."""
        model = self.accelerator.unwrap_model(model)
        return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model

    def _separate_values(self, model, input_ids, attention_mask, logits_to_keep, **options):
        """TRL's: every row padded to the longest of the step, with its own prompt."""
        width = input_ids.size(1)
        if width > (self._reach or width):  # longrope then moves the positions of all rows
            raise R3Error(
                f"a learning batch is {width} tokens wide, beyond the {self._reach} up to which "
                "this model's positions are those of sampling: lower max_completion_length or "
                "leave out long failures"
            )
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, **options
        )

    def _check_packing(self) -> bool:
        """Whether packed rows give this model's log-probs and gradients; logs why they do not."""
        why = unpackable(self.model)
        if self.args.neftune_noise_alpha:
            why = "the noise of neftune_noise_alpha goes by the length of a row"
        if why is None and not self._spread:
            training = self.model.training
            # on a CPU bitsandbytes repacks NF4 for inference, for good, in a forward in eval mode
            self.model.train(getattr(self.model, "is_quantized", False))
            for module in self.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.eval()
            why = self._difference_of_packing()
            self.model.train(training)
        if why is not None:
            logger.warning(
                f"{self.model.config.model_type}: a group's prompt is computed for each of its "
                f"reflections, not once, since {why}"
            )
        return why is None

    def _difference_of_packing(self) -> str | None:
        """How packed rows of the first failure differ from separate ones, or None."""
        failure = self.failures[0]
        ids = [*failure.prompt_ids, *failure.attempt_ids][-40:]
        third = max(1, len(ids) // 3)
        prompt, texts = ids[:third], [ids[third : 2 * third], ids[-third:][:5], ids[-third:][:5]]
        width = max(map(len, texts))
        padded = [prompt + text + [0] * (width - len(text)) for text in texts]
        seen = [[1] * (third + len(text)) + [0] * (width - len(text)) for text in texts]
        batch = [torch.tensor(x, device=self.model.device) for x in (padded, seen)]
        rows = list(range(len(texts)))
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def separate():
            values = self._separate_values(self.model, *batch, width, compute_entropy=True)
            return values[0] * batch[1][:, -width:]

        def packed():
            backbone = self._backbone(self.model)
            with self._autocast():
                return packed_values(self.model, backbone, *batch, width, rows)[0]

        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        exact = dtypes == {torch.float32} and not (self.args.bf16 or self.args.fp16)
        return difference(separate, packed, parameters, exact)
