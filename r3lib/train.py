"""Train with several processes: `accelerate launch -m r3lib.train --task countdown`."""

import argparse
import sys
from datetime import timedelta

from .cli import add_study, study_of
from .errors import R3Error
from .provenance import restart_with_allocator


def main(argv: list[str] | None = None) -> int:
    """Train one adapter, cached as notebook 03 would cache it; return 0, or 2 for an error."""
    parser = argparse.ArgumentParser(prog="r3lib.train", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    add_study(parser)
    options = parser.parse_args(argv)
    from accelerate import PartialState

    from .files import claimed
    from .weights import NO_SAMPLING, device, spreads_weights

    try:
        state = PartialState(cpu=device() == "cpu", timeout=timedelta(days=2))
        study = study_of(options)
        if study.profile.engine == "transformers" and spreads_weights():
            raise R3Error(NO_SAMPLING)
        with claimed(study.results, shared=True):
            with state.main_process_first():  # one mines, the others find it
                study.mine()
            path = study.train(options.seed)
    except R3Error as error:
        print(f"r3: error: {error}", file=sys.stderr)
        return 2
    if state.is_main_process:
        print(path)
    return 0


if __name__ == "__main__":
    restart_with_allocator()
    sys.exit(main())
