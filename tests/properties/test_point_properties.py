"""Whatever is done to a hook point, its lists, its answers and torch's own registrations agree."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tdcache.points import HookPoint

levels = st.sampled_from([None, 1, 2])
directions = st.sampled_from(["fwd", "bwd", "both"])
additions = st.tuples(st.just("add"), st.sampled_from(["fwd", "bwd"]), st.booleans(), levels, st.booleans())
removals = st.tuples(st.just("remove"), directions, st.booleans(), levels)
handles = st.tuples(st.just("handle"), st.integers(0, 20))


class Tag:
    """A hook that notes its number."""

    def __init__(self, number, seen):
        self.number, self.seen = number, seen

    def __call__(self, tensor, hook):
        self.seen.append(self.number)


@given(st.lists(st.one_of(additions, removals, handles), max_size=12))
def test_lists_and_calls_agree_with_a_plain_model_of_them(actions):
    point, seen, expected = HookPoint(), [], {"fwd": [], "bwd": []}
    for number, (what, *rest) in enumerate(actions):
        if what == "add":
            direction, permanent, level, prepend = rest
            point.add_hook(Tag(number, seen), direction, permanent, level, prepend)
            expected[direction].insert(0 if prepend else len(expected[direction]), (number, permanent, level))
        elif what == "remove":
            direction, permanent_too, level = rest
            point.remove_hooks(*rest)
            for which in expected if direction == "both" else [direction]:
                expected[which] = [
                    each for each in expected[which] if (each[1] and not permanent_too) or level not in (None, each[2])
                ]
        elif point.handles():
            handle = point.handles()[rest[0] % len(point.handles())]
            handle.hook.remove()
            for which in expected:
                expected[which] = [each for each in expected[which] if each[0] != handle.user_hook.number]
    for which, rows in expected.items():
        assert [(h.user_hook.number, h.is_permanent, h.context_level) for h in point.handles(which)] == rows
    point(torch.ones(1, requires_grad=True)).sum().backward()
    assert seen == [number for which in ("fwd", "bwd") for number, *_ in expected[which]]
    assert len(point._forward_hooks) == len(seen)
