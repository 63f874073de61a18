"""Selection of adversarial responses."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from nemo_advrm.objectives.selection import DROP_REASONS, first_step, qualifies, select_pairs, text_signature


def counts(**given: int) -> dict[str, int]:
    return {reason: given.get(reason, 0) for reason in DROP_REASONS}


def test_qualifying_needs_the_score_and_the_disagreement() -> None:
    scores = torch.tensor([[3.0, 0.0], [1.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    u_z = torch.tensor([2.0, 2.0, 1.96, math.nan])
    z = torch.tensor([[1.0, -1.0]] * 4)
    assert qualifies(scores, z, torch.ones(4), u_z, 1.96).tolist() == [True, False, False, False]


def test_the_others_can_be_required_to_dislike_the_response() -> None:
    scores, u_z = torch.full((3, 3), 3.0), torch.full((3,), 5.0)
    z = torch.tensor([[1.0, -1.0, -0.1], [1.0, -1.0, 0.1], [1.0, 0.0, -1.0]])
    lenient = qualifies(scores, z, torch.ones(3), u_z, 1.96, require_others_negative=False)
    strict = qualifies(scores, z, torch.ones(3), u_z, 1.96, require_others_negative=True)
    assert lenient.tolist() == [True, True, True]
    assert strict.tolist() == [True, False, False]


def test_the_target_is_the_member_whose_score_counts() -> None:
    scores, z = torch.tensor([[0.0, 3.0]]), torch.tensor([[-1.0, 1.0]])
    u_z = torch.tensor([5.0])
    assert not qualifies(scores, z, torch.ones(1), u_z, 1.96, target=0).item()
    assert qualifies(scores, z, torch.ones(1), u_z, 1.96, target=1, require_others_negative=True).item()


def select(ranking, responses, prompts=None, qualified=None, signature=None, **caps):
    size = len(ranking)
    options = {"unusable": [None] * size, "per_signature": 1, "per_prompt": 100, "total": 1000, "top_fraction": 1.0}
    return select_pairs(
        torch.tensor(qualified if qualified is not None else [True] * size),
        torch.tensor(ranking),
        prompts if prompts is not None else list(range(size)),
        responses,
        signature or (lambda i: responses[i]),
        **{**options, **caps},
    )


def test_rows_are_taken_by_rank_with_ties_by_index() -> None:
    assert select([1.0, 3.0, 2.0, 3.0], list("abcd")) == ([1, 3, 2, 0], counts())


@pytest.mark.parametrize(
    ("steps", "fraction", "first"),
    [(60, 1.0, 0), (60, 0.5, 30), (60, 0.33, 40), (60, 1 / 3, 40), (9, 0.1, 8), (10, 0.3, 7), (1, 0.01, 0)],
)
def test_the_last_part_of_the_steps_is_rounded_up_and_never_empty(steps: int, fraction: float, first: int) -> None:
    assert first_step(steps, fraction) == first


def test_rows_that_do_not_qualify_and_nan_are_dropped() -> None:
    taken, dropped = select([1.0, math.nan, 2.0], list("abc"), qualified=[True, True, False])
    assert taken == [0]
    assert dropped == counts(not_qualified=2)


def test_an_exact_duplicate_keeps_its_best_row_and_never_counts_as_near() -> None:
    taken, dropped = select([1.0, 2.0, 1.5], ["same"] * 3, prompts=[7, 7, 8], per_signature=5)
    assert taken == [1, 2]  # the same text to another prompt is another pair
    assert dropped == counts(exact_duplicate=1)


def test_every_cap_counts_what_it_drops() -> None:
    taken, dropped = select(
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        ["a1", "a2", "b1", "c1", "d1", "e1"],
        prompts=[0, 1, 0, 0, 2, 3],
        signature=lambda i: "aabcde"[i],
        per_signature=1,
        per_prompt=2,
        total=3,
    )
    assert taken == [0, 2, 4]
    assert dropped == counts(near_duplicate=1, prompt_cap=1, total_cap=1)


def test_the_top_fraction_is_taken_of_distinct_rows_and_rounded_up() -> None:
    taken, dropped = select([1.0, 2.0, 3.0, 3.0, 4.0, 5.0], list("abccde"), prompts=[0] * 6, top_fraction=0.5)
    assert taken == [5, 4, 2]
    assert dropped == counts(exact_duplicate=1, below_top_fraction=2)


def test_a_generator_draws_at_random_within_the_top_and_repeats() -> None:
    ranking = [float(i) for i in range(40)]
    responses = [str(i) for i in range(40)]

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return select(ranking, responses, top_fraction=0.5, total=10, generator=generator)[0]

    assert draw(0) == draw(0) != draw(1)
    assert set(draw(0)) <= set(range(20, 40)) and len(set(draw(0))) == 10
    assert draw(0) != sorted(draw(0), reverse=True)


def test_rows_taken_and_dropped_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    ranking = torch.randn(300, generator=generator)
    prompts = torch.randint(20, (300,), generator=generator).tolist()
    responses = torch.randint(40, (300,), generator=generator).tolist()
    taken, dropped = select_pairs(
        ranking > -1, ranking, prompts, responses, lambda i: responses[i] // 4, unusable=[None] * 300, per_signature=4,
        per_prompt=2, total=25, top_fraction=0.8, generator=generator,
    )  # fmt: skip
    assert len(taken) + sum(dropped.values()) == 300
    assert max(prompts[i] for i in taken) < 20
    assert all(sum(prompts[j] == prompts[i] for j in taken) <= 2 for i in taken)
    assert all(sum(responses[j] // 4 == responses[i] // 4 for j in taken) <= 4 for i in taken)


def test_nothing_qualifies_and_nothing_given() -> None:
    assert select([1.0], ["a"], qualified=[False]) == ([], counts(not_qualified=1))
    assert select([], []) == ([], counts())


def test_levelled_differences_share_a_text_signature() -> None:
    assert text_signature("Call 555-1234 NOW!!!\n\n  Please.") == text_signature("call 98-7 now!  please.")


def test_unlike_texts_do_not_share_a_text_signature() -> None:
    texts = [
        "The harbour was quiet before dawn, and the boats lay still.",
        "Add two cups of flour, then fold in the butter slowly.",
        "A reward model assigns a number to every response.",
        "敏捷的棕色狐狸跳过了懒狗。",
        "def add(a, b): return a + b",
        "",
    ]
    assert len({text_signature(text) for text in texts}) == len(texts)


def test_near_duplicates_share_a_text_signature_as_often_as_minhash_says() -> None:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (200, 300), generator=generator).tolist()
    shared = 0
    for row in letters:
        text = "".join(map(chr, row))
        # 296 and 311 shingles with 296 in common: Jaccard similarity 296 / 311, cubed 0.86
        shared += text_signature(text) == text_signature(text + " and that was it")
    assert 0.78 < shared / 200 < 0.94


def test_a_text_signature_is_the_same_in_every_process() -> None:
    code = "from nemo_advrm.objectives.selection import text_signature; print(text_signature('Some words, twice.'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(text_signature("Some words, twice."))
