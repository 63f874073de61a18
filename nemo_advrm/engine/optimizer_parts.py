"""Reads the state of Megatron's optimizer in another division than its own.

One optimizer has all weights, but where ranks have different experts there are two: of the experts, and of the rest.
Tensors have the same names in both; the settings of parameter groups stand at other places.
"""

from __future__ import annotations

from typing import Any

# what groups of parameters differ in, besides belonging to experts; NeMo writes some names with "pre_"
_KINDS = ("wd_mult", "lr_mult", "is_decoupled_lr")


def in_parts(state: dict[Any, Any], groups: list[list[dict[str, Any]]]) -> dict[Any, Any]:
    """The loaded ``state`` with the settings of a checkpoint where each part of the optimizer looks for them.

    Args:
        state: what was loaded: tensors at the places of this optimizer, settings at those of the checkpoint.
        groups: present parameter groups of each part.
    """
    numbers = sorted(key for key in state if isinstance(key, int))
    whole = "optimizer" in state or "param_groups" in state  # of one optimizer: this one, or the checkpoint's
    if (len(groups) == 1 and not numbers) or (len(groups) > 1 and not whole):
        return state
    if len(groups) == 1:
        saved = [state.pop(number) for number in numbers]
        _settle(state, saved, groups[0])
        return state
    parts = {number: state[number] for number in numbers}
    for number, own in parts.items():
        _settle(own, [state], groups[number])
    return parts


def _settle(own: dict[str, Any], saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Give the state of one part the settings of its groups, and the number of steps."""
    known = {_kind(group): group for part in saved for group in part.get("optimizer", part)["param_groups"]}
    settings = [{**known[_kind(group)], "is_expert_parallel": group["is_expert_parallel"]} for group in groups]
    if "param_state" in own:  # a distributed optimizer
        others = {key: value for key, value in saved[0].items() if isinstance(key, str)}
        own |= {**others, **own, "optimizer": {"param_groups": settings}}
        return
    ids = own["param_groups"]
    own["param_groups"] = [{**new, "params": of["params"]} for new, of in zip(settings, ids, strict=True)]
    steps = saved[0].get("state", {})
    if "common_step" in steps:
        own["state"]["common_step"] = steps["common_step"]


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _KINDS)
