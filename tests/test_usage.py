"""The compiler's report of its memory, in the encoding of protocol buffers."""

from sharding.usage import dump_options, read_usage


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


TABLE = b"""  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.00GiB( 66%);    1.00GiB;        49152;                2; bf16[1024,4096], f32[7]
    1.50GiB(100%);  512.00MiB;     33603584;                1; s32[1]
    1.50GiB(100%);      512.0B;            0;                1; pred[1]
"""


def report():
    fixed = bytes([4 << 3 | 1]) + bytes(8)
    heap = field(1, 3) + field(2, 3 * 2**29) + fixed + field(6, field(4, 32) + field(5, TABLE))
    small = field(1, 4) + field(2, 512) + field(6, field(5, TABLE))
    hbm = field(1, 2**31 + 5) + field(2, 0) + field(3, small) + field(3, heap)
    host = field(1, 2**36) + field(2, 5) + field(3, field(2, 2**36))
    return field(1, host) + field(1, hbm)


def test_hbm_and_the_largest_places_of_its_heap(tmp_path):
    (tmp_path / "module.after_optimizations-memory-usage-report.pb").write_bytes(report())
    used = read_usage(tmp_path, most=2)
    assert used is not None
    assert (used.hbm_bytes, used.heap_bytes, used.host_bytes) == (2**31 + 5, 3 * 2**29, 2**36)
    assert used.largest == ((2**30, "bf16[1024,4096], f32[7]"), (2**29, "s32[1]"))


def test_no_report_or_another_kind_of_file_is_none(tmp_path):
    assert read_usage(tmp_path) is None
    for data in (b"", b"not a report at all", report()[:40]):
        (tmp_path / "a-memory-usage-report.pb").write_bytes(data)
        assert read_usage(tmp_path) is None
    assert dump_options(tmp_path)["xla_dump_to"] == str(tmp_path)
