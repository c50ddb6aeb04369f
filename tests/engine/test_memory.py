"""How much memory there is, control groups included."""

import pytest

from sglite.engine import memory
from sglite.interface.errors import OutOfMemoryError


def make_machine(tmp_path, monkeypatch, available_kb=1000, cgroup="0::/a/b\n"):
    (tmp_path / "meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable: {available_kb} kB\n")
    (tmp_path / "self_cgroup").write_text(cgroup)
    root = tmp_path / "cgroup"
    (root / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "self_cgroup")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", root)
    return root


def write_group(folder, limit, used, inactive=0):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_without_limits_the_machine_decides(tmp_path, monkeypatch):
    root = make_machine(tmp_path, monkeypatch)
    write_group(root / "a" / "b", "max", 10)
    assert memory.available_memory() == 1000 * 1024


def test_the_tightest_group_above_decides(tmp_path, monkeypatch):
    root = make_machine(tmp_path, monkeypatch)
    write_group(root / "a" / "b", 500_000, 100_000)
    write_group(root / "a", 300_000, 200_000, inactive=50_000)
    assert memory.available_memory() == 150_000


def test_version_1_groups(tmp_path, monkeypatch):
    root = make_machine(tmp_path, monkeypatch, cgroup="4:cpu:/x\n3:cpuset,memory:/a\n")
    folder = root / "memory" / "a"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("400000")
    (folder / "memory.usage_in_bytes").write_text("100000")
    (folder / "memory.stat").write_text("total_inactive_file 20000\n")
    assert memory.available_memory() == 320_000


def test_this_machine_has_some():
    assert 1 << 20 < memory.available_memory() < 1 << 50


def test_kv_tokens_that_were_asked_for_must_fit(tmp_path, monkeypatch):
    make_machine(tmp_path, monkeypatch)
    assert memory.check_kv_tokens(1000, 1024) == 1000
    with pytest.raises(
        OutOfMemoryError, match=r"kv_cache_tokens=1001 needs 1025024 bytes.* enough for 1000 tokens"
    ):
        memory.check_kv_tokens(1001, 1024)


def test_kv_tokens_are_a_share(tmp_path, monkeypatch):
    make_machine(tmp_path, monkeypatch)
    assert memory.kv_tokens_that_fit(0.5, 1024) == 500
    with pytest.raises(OutOfMemoryError, match=r"mem_fraction=0\.5"):
        memory.kv_tokens_that_fit(0.5, 10**9)
