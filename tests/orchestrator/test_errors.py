from __future__ import annotations

import pickle

import pytest

from orchestrator import errors

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("cls", CLASSES)
def test_survives_pickling_with_its_message_and_exit_code(cls):
    error = cls("shard 3 of 4 is missing; do this")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls and str(copy) == str(error) and copy.exit_code == error.exit_code


def test_the_docstring_draws_every_class_with_its_exit_code():
    for cls in CLASSES:
        (line,) = [line for line in (errors.__doc__ or "").splitlines() if f"{cls.__name__}  " in line]
        assert line.split()[-1] == str(cls.exit_code)


def test_what_is_retried_or_cleaned_up_is_only_what_certainly_failed():
    assert not issubclass(errors.UnknownOutcomeError, errors.StorageError)
    assert not issubclass(errors.AlreadyExistsError, errors.StorageError)
