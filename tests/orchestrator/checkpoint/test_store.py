from __future__ import annotations

import errno
import os
import stat
import threading
import uuid

import fsspec
import pytest

from orchestrator.checkpoint import fsspec_objects, s3_objects
from orchestrator.checkpoint.fsspec_objects import FsspecObjects
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, MissingObjectError, StorageError, UnknownOutcomeError
from trainers.errors import ConfigError


@pytest.fixture
def store(any_store):
    """All of these run on S3 too."""
    return any_store


class TestContract:
    """What every store promises. The `store` fixture (conftest.py) names the kinds."""

    def test_an_object_comes_back_whole_and_in_parts(self, store):
        store.write("a/b", [b"0123", memoryview(b"456"), b"", bytearray(b"789")])
        assert store.read("a/b") == b"0123456789"
        assert store.read("a/b", 2, 5) == b"234"
        assert store.read("a/b", 7) == b"789"
        assert store.size("a/b") == 10 and store.exists("a/b")
        age_s = store.age_s("a/b")
        assert (age_s is None) == (store.backend.kind == "memory") and -2 < (age_s or 0.0) < 60

    def test_parts_larger_than_one_piece_arrive_in_order(self, store, monkeypatch):
        monkeypatch.setattr(fsspec_objects, "_WRITE_PIECE_BYTES", 1000)
        monkeypatch.setattr(s3_objects, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
        data = os.urandom((10 << 20) + 500)
        store.write("big", [data[:3], memoryview(data)[3:]])
        assert store.read("big") == data

    def test_buffers_of_other_element_types_are_written_as_bytes(self, store):
        store.write("wide", [memoryview(bytes(16)).cast("I")])
        assert store.size("wide") == 16

    def test_a_range_past_the_end_is_short(self, store):
        store.write("a", [b"0123"])
        assert store.read("a", 2, 10) == b"23"

    def test_a_range_is_read_to_where_it_belongs(self, store):
        store.write("a", [b"0123456789"])
        out = bytearray(b"........")
        view = memoryview(out)
        assert store.read_into("a", 2, [view[5:7], view[1:3]]) == 4 and out == b".45..23."
        assert store.read_into("a", 8, [view[7:], view[:1], view[3:5]]) == 2 and out == b"945..238"
        assert store.read_into("a", 10, [view]) == store.read_into("a", 3, []) == 0
        with pytest.raises(MissingObjectError, match="gone"):
            store.read_into("gone", 0, [view])

    def test_write_replaces(self, store):
        store.write("a", [b"a long first version"])
        store.write("a", [b"second"])
        assert store.read("a") == b"second"

    def test_a_missing_object_is_its_own_error(self, store):
        for look in (store.read, store.size):
            with pytest.raises(MissingObjectError, match="gone"):
                look("folder/gone")
        assert not store.exists("gone")

    def test_list_names_what_lies_directly_below(self, store):
        assert store.list("checkpoints") == []
        for key in ("checkpoints/b/1", "checkpoints/b/2", "checkpoints/a/1", "checkpoints/c", "run.json"):
            store.write(key, [b"x"])
        assert store.list("checkpoints") == ["a", "b", "c"]
        assert store.list("checkpoints/b") == ["1", "2"]
        assert store.list("check") == []

    def test_delete_may_be_repeated(self, store):
        store.write("a", [b"x"])
        store.delete("a")
        store.delete("a")
        assert not store.exists("a")

    def test_create_fails_on_other_bytes_and_keeps_the_first(self, store):
        store.create("a/token", b"mine")
        with pytest.raises(AlreadyExistsError, match="a/token"):
            store.create("a/token", b"theirs")
        assert store.read("a/token") == b"mine"

    def test_create_of_the_same_bytes_is_the_same_create(self, store):
        store.create("token", b"mine")
        store.create("token", b"mine")
        assert store.read("token") == b"mine"

    def test_one_of_many_creators_wins(self, store):
        for round_ in range(3 if store.backend.kind == "s3" else 10):
            won = run_threads(8, lambda i, key=f"race/{round_}": created(store, key, f"creator {i}".encode()))
            assert sum(won) == 1
            assert store.read(f"race/{round_}") == f"creator {won.index(True)}".encode()

    def test_an_interrupted_write_is_not_visible(self, store):
        store.write("a", [b"old"])
        for key in ("a", "new"):
            with pytest.raises(RuntimeError, match="interrupted"):
                store.write(key, interrupted())
        assert store.read("a") == b"old"
        assert not store.exists("new")
        store.write("new", [b"works again"])
        assert store.read("new") == b"works again"

    def test_two_stores_at_one_url_see_each_other(self, store):
        store.write("a", [b"x"])
        assert Store.open(store.url).read("a") == b"x"


def interrupted():
    class Parts(list):
        def __iter__(self):
            yield b"half of it"
            raise Interrupt("interrupted")

    return Parts()


class Interrupt(AssertionError, RuntimeError):
    """Not translated, as our own bugs are not."""


def created(store: Store, key: str, data: bytes) -> bool:
    try:
        store.create(key, data)
    except AlreadyExistsError:
        return False
    return True


def run_threads(count, function):
    results = [None] * count
    barrier = threading.Barrier(count)

    def run(i):
        barrier.wait()
        results[i] = function(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class LossyBackend(FsspecObjects):
    """A memory store whose creates raise `errors` in turn, before or after they took effect."""

    def __init__(self, errors, *, after: bool) -> None:
        super().__init__("memory", fsspec.filesystem("memory"))
        self.errors, self.after, self.calls, self.unreadable = list(errors), after, 0, False

    def create_once(self, path, data, timeout_s):
        self.calls += 1
        error = self.errors.pop(0) if self.errors else None
        if error is None or self.after:
            super().create_once(path, data, timeout_s)
        if error is not None:
            raise error

    def read(self, path, begin, end, timeout_s):
        if self.unreadable:
            raise OSError("down")
        return super().read(path, begin, end, timeout_s)


def lossy(errors, *, after: bool) -> Store:
    return Store("memory://lossy", f"/{uuid.uuid4().hex}", LossyBackend(errors, after=after))


class TestOutcomeOfACreate:
    def test_an_answer_that_got_lost_is_found_to_be_ours(self):
        store = lossy([TimeoutError("no answer")], after=True)
        store.create("a", b"mine")
        assert store.backend.calls == 1 and store.read("a") == b"mine"

    def test_precondition_failed_without_its_name_is_looked_at(self):
        store = lossy([OSError(errno.EINVAL, "PreconditionFailed")] * 2, after=False)
        store.write("a", [b"theirs"])
        with pytest.raises(AlreadyExistsError):
            store.create("a", b"mine")

    def test_what_is_absent_after_an_unclear_error_is_sent_again(self):
        store = lossy([OSError(errno.EIO, "reset"), RuntimeError("EndpointConnectionError")], after=False)
        store.create("a", b"mine")
        assert store.backend.calls == 3 and store.read("a") == b"mine"

    def test_absent_every_time_is_unknown(self):
        store = lossy([TimeoutError("no answer")] * 3, after=False)
        with pytest.raises(UnknownOutcomeError, match="delete nothing"):
            store.create("a", b"mine")

    def test_unreadable_after_an_unclear_error_is_unknown(self):
        store = lossy([TimeoutError("no answer")], after=True)
        store.backend.unreadable = True
        with pytest.raises(UnknownOutcomeError):
            store.create("a", b"mine")

    def test_a_refusal_is_certain(self):
        store = lossy([PermissionError("AccessDenied")], after=False)
        with pytest.raises(StorageError, match="permission denied"):
            store.create("a", b"mine")
        assert store.backend.calls == 1


class TestLocal:
    """What only a folder can show: faults placed between two system calls."""

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_write_that_breaks_leaves_the_old_object_and_no_litter(self, tmp_path, monkeypatch, call):
        store = Store.open(str(tmp_path))
        store.write("a", [b"old"])
        monkeypatch.setattr(os, call, failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StorageError, match="no space left"):
            store.write("a", [b"new"])
        assert store.read("a") == b"old" and os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize("call", ["fsync", "link"])
    def test_a_create_that_breaks_leaves_nothing(self, tmp_path, monkeypatch, call):
        store = Store.open(str(tmp_path))
        monkeypatch.setattr(os, call, failing(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StorageError, match="no space left"):
            store.create("a", b"new")
        assert os.listdir(tmp_path) == []

    def test_a_create_that_cannot_be_made_durable_names_nothing(self, tmp_path, monkeypatch):
        store = Store.open(str(tmp_path))
        monkeypatch.setattr(os, "open", failing(OSError(errno.EMFILE, "Too many open files")))
        with pytest.raises(StorageError, match="ulimit -n"):
            store.create("a", b"new")
        assert os.listdir(tmp_path) == []

    def test_a_create_is_not_said_to_have_failed_when_its_name_is_there(self, tmp_path, monkeypatch):
        store, fsync = Store.open(str(tmp_path)), os.fsync

        def fails_for_folders(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fails_for_folders)
        store.create("a", b"new")
        with pytest.raises(AlreadyExistsError):
            store.create("a", b"other")
        assert store.read("a") == b"new"

    def test_a_killed_writer_s_litter_is_not_listed(self, tmp_path):
        store = Store.open(str(tmp_path))
        store.write("folder/a", [b"x"])
        (tmp_path / "folder" / ".0123.tmp").write_bytes(b"half")
        assert store.list("folder") == ["a"]

    def test_a_folder_that_cannot_be_made_says_so(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError, match="cannot write"):
            Store.open(str(tmp_path / "file")).write("a", [b"x"])

    def test_permission_denied_says_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "makedirs", failing(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(StorageError, match=r"permission denied.* choose another `storage`"):
            Store.open(str(tmp_path)).write("a", [b"x"])

    def test_file_urls_and_paths_are_the_same_place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Store.open("runs").write("a", [b"x"])
        assert Store.open(f"file://{tmp_path}/runs/").read("a") == b"x"
        assert Store.open("runs").url == str(tmp_path / "runs")


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("url", ["nosuchprotocol://x/y"])
def test_an_unknown_protocol_is_the_user_s_to_fix(url):
    with pytest.raises(ConfigError, match="nosuchprotocol"):
        Store.open(url)
