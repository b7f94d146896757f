"""The prefix tree as pure data: which rows share what, and which tokens a query attends to."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from r3lib.engines.prefix_tree import PrefixTree, distinct, group_by_prefix, plan_batches

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
BEGINNINGS = [[], [7] * 16, [7] * 20, [7] * 19 + [8] * 9, [8] * 30]
PROMPTS = st.lists(
    st.builds(lambda start, rest: start + rest, st.sampled_from(BEGINNINGS), TOKENS),
    min_size=1,
    max_size=12,
)


def test_a_group_shares_the_longest_prefix_that_leaves_each_prompt_a_token():
    a, b = tuple(range(100, 130)), tuple(range(200, 220))
    prompts = sorted([a, (*a, 1, 2), (*a, 3), (*b, 1), (*b, 2), (7, 8, 9)])
    groups = group_by_prefix(prompts)
    assert [(group.shared, len(group.prompts)) for group in groups] == [(0, 1), (29, 3), (20, 2)]
    assert [ids for group in groups for ids in group.prompts] == prompts


def test_the_tree_drawn_in_the_docstring():
    tree = PrefixTree()
    tree.add_level([0], 6)
    tree.append(np.zeros(6, int))
    tree.add_level([0, 0, 0], 3)
    tree.append(np.array([0, 0, 1, 1, 1, 2]))
    tree.add_level([0, 0, 1, 1, 2], 5)
    for _ in range(3):
        tree.append(np.arange(5))
    prefixes, rests, sampled = tree.levels
    assert [level.start.tolist() for level in tree.levels] == [[0], [6, 6, 6], [8, 8, 9, 9, 7]]
    assert [level.length.tolist() for level in tree.levels] == [[6], [2, 3, 1], [3] * 5]
    step = tree.append(np.arange(5))
    assert step.position_ids.tolist() == [11, 11, 12, 12, 10]
    assert [grid.slots for grid in step.grids] == [5, 2, 1]
    assert step.grids[1].place.tolist() == [0, 1, 2, 3, 4]
    assert step.grids[1].visible.tolist() == [[2], [3], [1]]


@given(PROMPTS, st.integers(1, 3), st.integers(1, 7))
def test_batches_hold_every_sample_once_and_mix_no_shared_with_unshared(prompts, n, size):
    batches = plan_batches(prompts, n, size)
    rows = sorted((row.prompt, row.sample, row.ids) for batch in batches for row in batch)
    assert rows == [(i, k, tuple(ids)) for i, ids in enumerate(prompts) for k in range(n)]
    for batch in batches:
        assert len(batch) <= size
        assert len({row.shared > 0 for row in batch}) == 1
        assert all(row.shared < len(row.ids) for row in batch)


@given(PROMPTS, st.integers(1, 3), st.data())
def test_every_query_sees_its_own_context_and_nothing_else(prompts, n, data):
    """Prefill, decode, drop rows, decode: with tokens in place of keys, a path spells the context."""
    for rows in plan_batches(prompts, n, 64):
        spelled = Spelled()
        texts, owner = distinct([(row.ids, row.shared) for row in rows])
        prefixes, parent = distinct([ids[:shared] for ids, shared in texts])
        if prefixes != [()]:
            spelled.add(prefixes, [0] * len(prefixes))
        spelled.add([ids[shared:] for ids, shared in texts], parent)
        spelled.tree.add_level(owner, 4)
        contexts = [list(row.ids) for row in rows]
        contexts = spelled.decode(contexts, 91)
        kept = data.draw(st.sets(st.sampled_from(range(len(rows))), min_size=1))
        kept = np.array(sorted(kept))
        spelled.keep(kept)
        contexts = spelled.decode([contexts[i] for i in kept], 92)
        spelled.decode(contexts, 93)


class Spelled:
    """A tree with the tokens themselves in place of keys: {(level, row, column): token}."""

    def __init__(self):
        self.tree, self.tokens = PrefixTree(), {}

    def add(self, texts, parent):
        self.tree.add_level(parent, max(map(len, texts)))
        rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        self.append(rows, [token for text in texts for token in text])

    def append(self, rows, tokens):
        """The context that each query sees, itself included; their position ids must fit it."""
        step = self.tree.append(rows)
        last = len(self.tree.levels) - 1
        for row, column, token in zip(step.rows, step.columns, tokens):
            assert column < self.tree.levels[-1].width
            assert (last, row, column) not in self.tokens
            self.tokens[last, row, column] = token
        seen = [self.seen(step, query) for query in range(len(rows))]
        assert step.position_ids.tolist() == [len(context) - 1 for context in seen]
        return seen

    def seen(self, step, query):
        context = []
        for level, grid in enumerate(step.grids):
            row, slot = divmod(int(grid.place[query]), grid.slots)
            visible = np.broadcast_to(grid.visible, (len(grid.visible), grid.slots))[row, slot]
            row += grid.rows.start
            context += [self.tokens[level, row, column] for column in range(visible)]
        return context

    def decode(self, contexts, token):
        contexts = [[*context, token] for context in contexts]
        assert self.append(np.arange(len(contexts)), [token] * len(contexts)) == contexts
        return contexts

    def keep(self, rows):
        old = self.tokens
        kept = self.tree.keep(rows)
        places = [{was: now for now, was in enumerate(rows)} for rows in kept]
        moved = [(at, token) for at, token in old.items() if at[1] in places[at[0]]]
        self.tokens = {(level, places[level][row], column): t for (level, row, column), t in moved}
