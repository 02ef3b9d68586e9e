"""Mistakes in what a checkpoint is: writing, committing, claiming, listing, reading."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/orchestrator/checkpoint"
_WRITER = "orchestrator/checkpoint/writer.py"
_MANIFEST = "orchestrator/checkpoint/manifest.py"
_ATTEMPTS = "orchestrator/checkpoint/attempts.py"
_CATALOG = "orchestrator/checkpoint/catalog.py"
_READER = "orchestrator/checkpoint/reader.py"
_COMMIT = f"{_TESTS}/test_writer.py::TestCommit"

CHECKPOINTS = (
    Mutant(
        "a shard is not read back",
        _WRITER,
        'if verify == "full":',
        'if verify == "all":',
        f"{_TESTS}/test_writer.py::test_what_reads_back_otherwise_gets_no_receipt",
    ),
    Mutant(
        "a shard that was cut short passes",
        _WRITER,
        "if size_bytes != file.size_bytes:",
        "if size_bytes > file.size_bytes:",
        f"{_TESTS}/test_writer.py::test_what_reads_back_otherwise_gets_no_receipt",
    ),
    Mutant(
        "of a shard only the beginning is sampled",
        _WRITER,
        "begins = sorted({0, *chosen, max(0, size_bytes - _SAMPLE_BYTES)})",
        "begins = sorted({0, *chosen})",
        f"{_TESTS}/test_writer.py::test_how_much_is_read_back",
    ),
    Mutant(
        "rows are fingerprinted by their place in the shard",
        _WRITER,
        "partial_fingerprint(spec, chunk.row_offset + row, block)",
        "partial_fingerprint(spec, row, block)",
        f"{_TESTS}/test_writer.py::test_the_fingerprints_do_not_depend_on_the_world_size",
    ),
    Mutant(
        "a commit does not ask who owns the run",
        _WRITER,
        "    check_not_superseded(store, info.attempt)\n    try:",
        "    try:",
        f"{_COMMIT}::test_of_two_attempts_the_superseded_one_stops",
    ),
    Mutant(
        "who is superseded while it commits is told something else",
        _WRITER,
        "        check_not_superseded(store, info.attempt)\n    committed = ",
        "        pass\n    committed = ",
        f"{_TESTS}/test_catalog.py::test_who_is_superseded_between_its_check_and_its_commit_commits_nothing",
    ),
    Mutant(
        "another checkpoint under our reference is taken for ours",
        _WRITER,
        "if (committed.files, committed.tensors) != (manifest.files, manifest.tensors):",
        "if committed.ref != manifest.ref:",
        f"{_COMMIT}::test_another_checkpoint_under_the_same_reference_stays",
    ),
    Mutant(
        "the shard of a rank may be missing if it holds no rows",
        _WRITER,
        "if names and names == [file.name for file in manifest.files] else",
        "if names else",
        f"{_COMMIT}::test_a_missing_shard_is_refused_even_if_it_held_no_rows",
    ),
    Mutant(
        "the digest of a manifest is not compared",
        _MANIFEST,
        "if not lead or end != xxhash.xxh3_128_hexdigest(body).encode() + _DIGEST_TAIL:",
        "if not lead:",
        f"{_TESTS}/test_manifest.py::test_every_truncation_and_an_appended_byte_is_found",
    ),
    Mutant(
        "rows may be in a checkpoint twice",
        _MANIFEST,
        "if chunk.row_offset != next_row:",
        "if chunk.row_offset > next_row:",
        f"{_TESTS}/test_manifest.py::test_rows_and_bytes_are_covered_exactly_once",
    ),
    Mutant(
        "bytes of a shard may belong to nothing",
        _MANIFEST,
        "if next_byte != file.size_bytes:",
        "if next_byte > file.size_bytes:",
        f"{_TESTS}/test_manifest.py::test_rows_and_bytes_are_covered_exactly_once",
    ),
    Mutant(
        "two claimers get one number",
        _ATTEMPTS,
        "            continue\n        return attempt",
        "            pass\n        return attempt",
        f"{_TESTS}/test_attempts.py::test_racing_claimers_with_equal_info_get_different_numbers[local]",
    ),
    Mutant(
        "the claims of two claimers can be alike",
        _ATTEMPTS,
        ', "token": uuid.uuid4().hex, **info}',
        ", **info}",
        f"{_TESTS}/test_attempts.py::test_racing_claimers_with_equal_info_get_different_numbers[local]",
    ),
    Mutant(
        "an attempt trusts a store to list its successor at once",
        _ATTEMPTS,
        "if store.exists(keys.attempt_key(newer)) or (newer",
        "if (newer",
        f"{_TESTS}/test_attempts.py::test_who_is_superseded_finds_out_by_name[local]",
    ),
    Mutant(
        "attempts are counted instead of numbered",
        _ATTEMPTS,
        "return max(_claimed(store), default=0)",
        "return len(_claimed(store))",
        f"{_TESTS}/test_attempts.py::test_foreign_files_are_no_attempts[local]",
    ),
    Mutant(
        "an unhealthy checkpoint counts",
        _CATALOG,
        'if not manifest.health["ok"]:',
        "if not manifest.health:",
        f"{_TESTS}/test_catalog.py::test_every_state_is_told_apart_newest_first[local]",
    ),
    Mutant(
        "a quarantined checkpoint counts",
        _CATALOG,
        "if keys.QUARANTINE_NAME in names:",
        "if keys.QUARANTINE_NAME in names and keys.MANIFEST_NAME not in names:",
        f"{_TESTS}/test_catalog.py::test_every_state_is_told_apart_newest_first[local]",
    ),
    Mutant(
        "a checkpoint counts without a look at its files",
        _CATALOG,
        "for name in absent if not store.exists(ref.file(name))), None)",
        "for name in absent if store.exists(ref.file(name))), None)",
        f"{_TESTS}/test_catalog.py::test_a_missing_file_is_seen_without_reading_any",
    ),
    Mutant(
        "what a store lists late is taken for damage",
        _CATALOG,
        "(name for name in absent if not store.exists(ref.file(name)))",
        "(name for name in absent)",
        f"{_TESTS}/test_catalog.py::test_what_a_store_lists_late_is_not_missing",
    ),
    Mutant(
        "of all older attempts only the last one is closed",
        _CATALOG,
        "CheckpointState.WRITING and info.ref.attempt < attempt:",
        "CheckpointState.WRITING and info.ref.attempt == attempt - 1:",
        f"{_TESTS}/test_catalog.py::test_every_older_attempt_is_closed",
    ),
    Mutant(
        "the oldest checkpoint is the first one",
        _CATALOG,
        "sorted((ref for ref in refs if ref is not None), reverse=True)",
        "sorted(ref for ref in refs if ref is not None)",
        f"{_TESTS}/test_catalog.py::test_of_one_progress_the_newest_attempt_counts",
    ),
    Mutant(
        "the manifest of another checkpoint is taken",
        _CATALOG,
        "if manifest.ref != ref:",
        "if manifest.attempt != ref.attempt:",
        f"{_TESTS}/test_catalog.py::test_a_manifest_of_another_checkpoint_is_damage",
    ),
    Mutant(
        "what was looked at once is never looked at again",
        _CATALOG,
        "if known is not None and known.names == names:",
        "if known is not None:",
        f"{_TESTS}/test_catalog.py::test_what_was_seen_is_not_read_again_unless_something_came_or_went",
    ),
    Mutant(
        "of one step the oldest attempt is shown",
        "orchestrator/checkpoint/selection.py",
        "for info in reversed(list_checkpoints(store)):",
        "for info in list_checkpoints(store):",
        f"{_TESTS}/test_selection.py",
    ),
    Mutant(
        "the hash of a chunk is not compared",
        _READER,
        "if xxhash.xxh3_128_hexdigest(check.out) != check.chunk.hash:",
        "if len(check.out) != check.chunk.end - check.chunk.begin:",
        f"{_TESTS}/test_reader.py::test_other_damage_is_found_and_named",
    ),
    Mutant(
        "the hash of a header is not compared",
        _READER,
        "if xxhash.xxh3_128_hexdigest(_header(store, ref, file)) != file.header_hash:",
        "if len(_header(store, ref, file)) != file.header_bytes:",
        f"{_TESTS}/test_reader.py::test_none_of_2000_bit_flips_over_all_files_loads",
    ),
    Mutant(
        "a full check compares no fingerprints",
        _READER,
        "        if found != expected:",
        "        if not found:",
        f"{_TESTS}/test_reader.py::test_verify_compares_the_fingerprints",
    ),
    Mutant(
        "rows are read from the beginning of their chunk",
        _READER,
        "at = chunk.begin + (begin - chunk.row_offset) * row_bytes",
        "at = chunk.begin",
        f"{_TESTS}/test_reader.py::test_only_the_wanted_rows_and_the_headers_of_their_files_are_read",
    ),
)
