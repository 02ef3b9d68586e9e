from __future__ import annotations

from typing import Any

import pytest

from orchestrator.credentials import refuse_secrets, secret_keys
from trainers.errors import ConfigError


@pytest.mark.parametrize(
    ("tree", "keys"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "x", "AWS_ACCESS_KEY_ID": "y", "AWS_SESSION_TOKEN": "z"}, 3),
        ({"WANDB_API_KEY": "x"}, 1),
        ({"HF_TOKEN": "x"}, 1),
        ({"MY_PASSWORD": "x", "db_passwd": "y"}, 2),
        ({"tracking": {"wandb": {"api_key": "${oc.env:ANYTHING}"}}}, 1),
        ({"note": "${oc.env:HF_TOKEN}"}, 1),
        ({"note": "${oc.env:WANDB_API_KEY,none}"}, 1),
        ({"storage": "s3://me:hunter2@bucket/x"}, 1),
        ({"cache": "redis://:hunter2@host"}, 1),
        ({"data": {"urls": ["https://a/b", "https://a/b?X-Amz-Signature=abc"]}}, 1),
        ({"note": "AKIAABCDEFGHIJKLMNOP"}, 1),
        ({"note": "hf_" + "a" * 30}, 1),
        ({"DB_PASSWORD": 12345}, 1),
    ],
)
def test_what_looks_like_a_secret(tree: dict[str, Any], keys: int):
    assert len(list(secret_keys(tree))) == keys


@pytest.mark.parametrize(
    "tree",
    [
        {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "AWS_ENDPOINT_URL_S3": "http://host:8333"},
        {"model": {"args": {"pad_token": "<pad>", "class_token": "x", "num_tokens": 77, "learnable_token": True}}},
        {"storage": "s3://bucket/user@home/x", "api_key": None, "token": ""},
        {"note": "${oc.env:HOME}/x", "data": {"tokenizer": "org/name", "revision": "0" * 40}},
    ],
)
def test_what_does_not(tree: dict[str, Any]):
    assert list(secret_keys(tree)) == []
    refuse_secrets(tree, "here")


def test_the_refusal_names_the_key_and_never_the_value():
    with pytest.raises(ConfigError) as caught:
        refuse_secrets({"a": {"api_key": "hunter2"}, "b": ["x://u:hunter2@h"], "hf_" + "k" * 30: "hunter2"}, "c.yaml")
    text = str(caught.value)
    assert text.startswith("c.yaml: a.api_key, b[0]")
    assert "Kubernetes Secret" in text and "IAM role" in text and "~/.netrc" in text
    assert "hunter2" not in text and "kkk" not in text
