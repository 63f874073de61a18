"""Members are brought to one scale by the SFT responses of their reference, and what is said of the reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_advrm.config import load_config
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.evaluation import pair_accuracy
from nemo_advrm.rewards.local import FunctionReward
from nemo_advrm.rewards.standardisation import described, read_statistics, write_statistics

pytestmark = pytest.mark.usefixtures("single")

# response -> scores of the two members; the mean of member 1 is 2, of member 2 10
SCORES = {"a": (0.0, 40.0), "b": (4.0, -20.0), "c": (1.0, 10.0), "d": (3.0, 10.0)}
ROWS = [
    {"prompt_id": i // 2, "messages": [{"role": "user", "content": f"p{i // 2}"}], "response": r, "scores": list(s)}
    for i, (r, s) in enumerate(SCORES.items())
]


def _sources(order: tuple[int, ...] = (0, 1), shift: float = 0.0) -> list[FunctionReward]:
    return [
        FunctionReward(f"R_{k + 1}", lambda _, responses, ended, k=k: [SCORES[r[-1]][k] + shift for r in responses])
        for k in order
    ]


def test_each_member_has_one_mean_and_one_spread_over_all_prompts(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    write_jsonl_atomic(path, ROWS)
    statistics = read_statistics(path, _sources(), "ensemble.reference_path")
    assert statistics.mean_K.tolist() == [2.0, 10.0]
    # squares 4 + 4 + 1 + 1 and 900 + 900, of 3 degrees of freedom, and the error of a mean of 4
    wanted = [(10 / 3 * 5 / 4) ** 0.5, (1800 / 3 * 5 / 4) ** 0.5]
    assert statistics.std_K.tolist() == pytest.approx(wanted)
    write_statistics(tmp_path, statistics, _sources())
    rows = [json.loads(line) for line in (tmp_path / "standardisation.jsonl").read_text().splitlines()]
    assert [row["member"] for row in rows] == ["R_1", "R_2"]
    assert [row["std"] for row in rows] == pytest.approx(wanted)


def test_a_reference_of_other_members_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    write_jsonl_atomic(path, ROWS)
    with pytest.raises(ConfigError, match=r"serve\.reference_path=.*reference\.jsonl has scores of 2 members.*names 1"):
        read_statistics(path, _sources((0,)), "serve.reference_path")
    with pytest.raises(ConfigError, match=r"its scores of member 1 are not those of R_2, which differ by"):
        read_statistics(path, _sources((1, 0)), "serve.reference_path")
    with pytest.raises(ConfigError, match="its scores of member 1 are not those of R_1"):
        read_statistics(path, _sources(shift=1.0), "serve.reference_path")
    read_statistics(path, _sources(shift=0.01), "serve.reference_path")  # the same weights in another precision


def test_a_reference_of_prompts_that_a_template_was_written_into_is_taken(tmp_path: Path) -> None:
    """NeMo-Aligner's actors answer texts: their members have scored prompt and response as one text."""
    path = tmp_path / "reference.jsonl"
    write_jsonl_atomic(path, ROWS)

    def text_scorer(k: int, shift: float = 0.0) -> FunctionReward:
        def score(prompts: list, responses: list[str], ended: list[bool]) -> list[float]:
            whole = [r for p, r in zip(prompts, responses, strict=True) if not p and r[:2] in ("p0", "p1")]
            return [SCORES[r[2:]][k] + shift for r in whole] if whole else [100.0] * len(responses)

        return FunctionReward(f"R_{k + 1}", score)

    read_statistics(path, [text_scorer(0), text_scorer(1)], "serve.reference_path")
    with pytest.raises(ConfigError, match="its scores of member 2 are not those of R_2"):
        read_statistics(path, [text_scorer(0), text_scorer(1, 20.0)], "serve.reference_path")


def test_responses_that_a_member_cannot_take_are_no_probes(tmp_path: Path) -> None:
    """A policy that sees the end of long prompts has answered them; their whole text exceeds a member's positions."""
    path = tmp_path / "reference.jsonl"
    prompts = [[{"role": "user", "content": content}] for content in ("p", "long " * 40)]
    write_jsonl_atomic(path, [{**row, "messages": prompts[row["prompt_id"]]} for row in ROWS])
    scored: list[str] = []

    def limited(k: int, longest: int) -> FunctionReward:
        def score(prompts: list, responses: list[str], ended: list[bool]) -> list[float]:
            scored.extend(responses)
            assert all(len(messages[0]["content"]) < longest for messages in prompts)
            return [SCORES[r][k] for r in responses]

        source = FunctionReward(f"R_{k + 1}", score)
        source.tokenizer, source.longest = ByteTokenizer(), longest  # type: ignore[attr-defined]
        return source

    read_statistics(path, [limited(0, 64), limited(1, 1000)], "ensemble.reference_path")
    assert set(scored[:2]) == {"a", "b"} and set(scored[2:]) == set(SCORES)


def test_evaluate_combines_members_on_one_scale_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    write_jsonl_atomic(path, ROWS)
    # chosen a, b; rejected c, d. Standardised: a -0.98 and 1.10, b 0.98 and -1.10, c -0.49 and 0, d 0.49 and 0
    first, second = (torch.tensor([SCORES[r][k] for r in "abcd"]) for k in range(2))
    scored = [(["f:1", "f:2"], first), (["f:1", "f:2"], second)]

    def line(*settings: str, parts: list = scored) -> str:
        return pair_accuracy.combined_line(load_config(settings), _sources(), parts)

    given = f"ensemble.reference_path={path}"
    # means: a 0.06 against c -0.24, b -0.06 against d 0.24
    assert line(given).startswith("mean of the members: accuracy 0.5000  margin 0.0000  (2 pairs)\nreward: mean of 2")
    assert "on standardised scores" in line(given)
    raw = line("ensemble.standardise=false")  # means: a 20 against c 5.5, b -8 against d 6.5
    assert raw.startswith("mean of the members: accuracy 0.5000  margin 0.0000") and "on raw scores" in raw
    low = line(given, "ensemble.aggregate=lcb")  # which is min: a -0.98 against c -0.49, b -1.10 against d 0
    assert "accuracy 0.0000  margin -0.7927" in low and "exactly the min" in low
    assert line().startswith("not combined: the members' raw scores") and "ensemble.reference_path" in line()
    assert "scored different pairs" in line(given, parts=[scored[0], (["f:1"], second[::2])])


@pytest.mark.parametrize(
    ("aggregate", "coefficient", "members", "said"),
    [
        ("lcb", 1.0, 2, "lcb with 2 members and the coefficient 1 is exactly the min"),
        ("lcb", 1.0, 3, None),
        ("lcb", 0.5, 2, None),
        ("uwo", 0.0, 3, "uwo with 3 members and the coefficient 0 is exactly the mean"),
        ("entropic", 0.0, 3, "entropic with 3 members and the coefficient 0 is exactly the min"),
        ("min", 1.0, 1, "min with 1 member and the coefficient 1 is exactly the mean"),
        ("mean", 1.0, 1, None),
    ],
)
def test_a_reward_that_equals_a_simpler_one_is_warned_of(
    aggregate: str, coefficient: float, members: int, said: str | None
) -> None:
    lines = described(aggregate, coefficient, members, standardised=True)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == (said is not None) and (said is None or said in warnings[0])
    assert (members > 1) == any("on standardised scores: " in line for line in lines)


def test_the_papers_name_is_told() -> None:
    assert "the Adv-RM paper's UWO" in described("lcb", 0.5, 3, standardised=False)[0]
