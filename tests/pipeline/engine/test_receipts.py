"""Receipts are kept, the newest of a shard counts, and rows add up by status."""

from __future__ import annotations

from pathlib import Path

from pipeline.engine.receipts import Receipt, ReceiptLog, add_up, read_receipts

ABC = "abcabcabcabc"  # a fingerprint


def receipt(shard: int, *, ok: bool = True, rows: dict[str, int] | None = None) -> Receipt:
    return Receipt("instances", ABC, shard, ok, 1.5, rows or {}, {"crf": 0.5}, error=None if ok else "boom\nü")


def test_round_trip() -> None:
    for original in (receipt(1, rows={"ok": 2}), receipt(2, ok=False)):
        assert Receipt.from_json(original.to_json()) == original


def test_the_newest_receipt_of_a_shard_counts(tmp_path: Path) -> None:
    first = ReceiptLog(str(tmp_path), "instances", ABC)
    first.append(receipt(0, rows={"ok": 3}))
    first.append(receipt(1, ok=False))
    first.flush()
    second = ReceiptLog(str(tmp_path), "instances", ABC)
    second.append(receipt(1, rows={"ok": 1, "empty": 2}))
    second.flush()
    other = ReceiptLog(str(tmp_path), "instances", "0" * 12)
    other.append(receipt(7))
    other.flush()
    found = read_receipts(str(tmp_path), "instances", ABC)
    assert [(r.shard, r.ok, r.images) for r in found] == [(0, True, 3), (1, True, 3)]
    assert [r.shard for r in read_receipts(str(tmp_path), "instances")] == [7]
    assert add_up(r.rows for r in found) == {"ok": 4, "empty": 2}


def test_images_outside_a_sample_were_not_looked_at() -> None:
    assert receipt(0, rows={"ok": 3, "not_sampled": 9, "missing": 1}).images == 4


def test_no_receipts_yet(tmp_path: Path) -> None:
    assert read_receipts(str(tmp_path), "instances", ABC) == []
    ReceiptLog(str(tmp_path), "instances", ABC).flush()
    assert not (tmp_path / "receipts").exists()
