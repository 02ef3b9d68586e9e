from __future__ import annotations

import pytest

from orchestrator.deploy.render import EXAMPLE_STORAGE, FILES, fill_in, policy_for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1 # <- n\n", "a: 7 # <- n\n"),
        ('  - a: "1"  # <- n', '  - a: "7"  # <- n'),
        ("#SBATCH --nodes=2\nx=1\n", "#SBATCH --nodes=2\nx=1\n"),
        ("# <- n\n#SBATCH --nodes=2-4\nx=1\n", "# <- n\n#SBATCH --nodes=7\nx=1\n"),
        ("  # <- n\n  N=1\n", "  # <- n\n  N=7\n"),
        ("a: 1 # <- gone\nb: 2\n", "b: 2\n"),
        ("a: [b, c] # <- n", "a: 7 # <- n"),
        ("url: s3://a/b # <- n", "url: 7 # <- n"),
        ("- x # <- n", "- 7 # <- n"),
    ],
)
def test_a_marked_value_is_replaced_and_nothing_else(text: str, expected: str):
    assert fill_in(text, {"n": "7", "gone": None}) == expected


def test_a_mark_that_nobody_knows_is_our_bug():
    with pytest.raises(KeyError):
        fill_in("a: 1 # <- m", {"n": "7"})
    with pytest.raises(AssertionError):
        fill_in("no value here # <- n", {"n": "7"})


@pytest.mark.parametrize(("storage", "runs"), [("s3://b/x/y", "b/x/y/*"), ("s3://b", "b/*"), ("s3://b/x/", "b/x/*")])
def test_a_policy_names_the_bucket_of_the_config(storage: str, runs: str):
    text = (FILES / "s3/bucket-policy.json").read_text()
    moved = policy_for(text, storage)
    assert f'"arn:aws:s3:::{runs}"' in moved and '"arn:aws:s3:::b"' in moved and "my-bucket" not in moved
    assert policy_for(text, EXAMPLE_STORAGE) == text
