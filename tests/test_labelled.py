"""Labelled images and rows of one's own: every format against the arrays that were written, and errors."""

import dataclasses
import io
import shutil
import zlib

import jax
import numpy as np
import pytest

from configs import presets
from models.vittt import ViTTTConfig
from train import trainer
from train.cli import main
from train.data.examples import parse_example
from train.data.labelled import Images, Table, parts
from train.evaluate import HeldOut
from train.metrics import read, series
from train.objectives import Classify
from train.overrides import override

pytest.importorskip("array_record")
pa = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")
import pyarrow.parquet as pq  # noqa: E402

NAMES = ("cat", "dog", "owl")
COUNTS = (7, 12, 5)
LABELS = np.repeat([0, 1, 2], COUNTS)


def pixels(side=6, channels=3):
    shape = (len(LABELS), side, side, *((3,) if channels == 3 else ()))
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(x):
    out = io.BytesIO()
    Image.fromarray(x).save(out, "PNG")
    return out.getvalue()


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, body):
    return varint(number << 3 | 2) + varint(len(body)) + body


def example(**features):
    """A serialised tf.train.Example, by the wire format."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif isinstance(value, list):
            feature = field(2, field(1, np.asarray(value, "<f4").tobytes()))
        else:
            feature = field(3, field(1, varint(value)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def write_records(file, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)


def write_images(kind, folder, x, texts=True):
    """The images in a format; text labels where they are texts there."""
    if kind == "folder":
        for i, (image, k) in enumerate(zip(x, LABELS, strict=True)):
            (folder / NAMES[k]).mkdir(exist_ok=True)
            (folder / NAMES[k] / f"{i:03}.png").write_bytes(png(image))
        (folder / "note.txt").write_text("no class")
        (folder / ".hidden").mkdir(exist_ok=True)
        return str(folder)
    labels = [NAMES[k] if texts else int(k) for k in LABELS]
    if kind == "parquet":
        rows = pa.table({"image": [png(a) for a in x], "label": labels})
        pq.write_table(rows, folder / "x.parquet")
        return str(folder / "*.parquet")
    if kind == "hugging face":
        rows = pa.table({"label": labels, "img": [{"bytes": png(a), "path": None} for a in x]})
        pq.write_table(rows, folder / "x.parquet")
        return str(folder)
    coded = [k.encode() if texts else k for k in labels]
    records = [example(image=png(a), label=k, id=b"1") for a, k in zip(x, coded, strict=True)]
    return write_records(folder / "x.array_record", records)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["folder", "parquet", "hugging face", "array_record"])
def test_every_format_gives_the_images_that_were_written(kind, channels, tmp_path):
    x = pixels(channels=channels)
    files = (write_images(kind, tmp_path, x, texts=channels == 3),)
    source = Images(files=files, classes=3, image=6, channels=channels, held_out=0.25)
    seen = {}
    for split in ("train", "valid"):
        rows = source.make(4, seed=0, split=split)
        got = [rows.batch_at(i) for i in range(-(-rows.size // 4))]
        images = np.concatenate([b["images"] for b in got])[: rows.size]
        labels = np.concatenate([b["labels"] for b in got])[: rows.size]
        assert images.dtype == np.float32 and labels.dtype == np.int32
        assert rows.spec["images"].shape == (4, *x.shape[1:])
        seen[split] = {i.tobytes(): k for i, k in zip(images, labels, strict=True)}
        assert len(seen[split]) == rows.size
    assert not set(seen["train"]) & set(seen["valid"])
    want = {(a / np.float32(255)).tobytes(): k for a, k in zip(x, LABELS, strict=True)}
    assert seen["train"] | seen["valid"] == want
    # A quarter of every class, rounded.
    assert list(np.bincount(list(seen["valid"].values()))) == [2, 3, 1]


def test_batches_are_functions_of_the_step_on_any_number_of_processes(tmp_path):
    files = (write_images("array_record", tmp_path, pixels()),)
    source = Images(files=files, classes=3, image=6)
    rows = source.make(8, seed=1, split="train")
    whole = [rows.batch_at(i) for i in range(10)]
    again = source.make(8, seed=1, split="train", process_index=1, process_count=2)
    for i in (7, 0, 3):  # in any order, after a restart
        part = again.batch_at(i, slice(2, 5))
        for name, x in part.items():
            np.testing.assert_array_equal(x, whole[i][name][2:5])
    # Epochs: every image once each, in another order.
    stream = np.concatenate([b["images"] for b in whole])
    epochs = [stream[i * rows.size : (i + 1) * rows.size] for i in range(3)]
    keys = [[a.tobytes() for a in e] for e in epochs]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2]) and keys[0] != keys[1]
    other = source.make(8, seed=2, split="train")
    assert not np.array_equal(other.batch_at(0)["images"], whole[0]["images"])
    # What is held out does not depend on the seed of the run.
    valid = [source.make(2, seed=s, split="valid").batch_at(0)["images"] for s in (1, 2)]
    np.testing.assert_array_equal(*valid)


def test_images_of_other_sizes_and_modes_are_cut_and_converted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = [255, 0, 51]  # the central square
    Image.fromarray(wide).save(tmp_path / "a" / "0.png")
    Image.fromarray(np.full((4, 4), 51, np.uint8)).save(tmp_path / "b" / "0.PNG")
    make = lambda **how: Images(  # noqa: E731
        files=(str(tmp_path),), valid_files=(str(tmp_path),), classes=2, **how
    ).make(2, seed=0, split="valid")
    colour = make(image=2).batch_at(0)
    np.testing.assert_array_equal(colour["labels"], [0, 1])
    np.testing.assert_allclose(colour["images"][0], np.tile([1, 0, 0.2], (2, 2, 1)), atol=1e-6)
    np.testing.assert_allclose(colour["images"][1], 0.2, atol=1e-6)
    grey = make(image=4, channels=1).batch_at(0)["images"]
    luma = round(0.299 * 255 + 0.114 * 51) / 255  # ITU-R 601
    np.testing.assert_allclose(grey[0], luma, atol=1 / 255)
    np.testing.assert_allclose(grey[1], 0.2, atol=1e-6)


@pytest.mark.parametrize("kind", ["parquet", "lists", "array_record"])
def test_rows_of_numbers_are_standardised_by_the_training_part(kind, tmp_path):
    x = np.random.default_rng(0).normal(3, 2, (len(LABELS), 3)).astype(np.float32)
    x[:, 2] = 7  # no deviation
    if kind == "array_record":
        records = [example(x=[float(v) for v in r], label=int(k))
                   for r, k in zip(x, LABELS, strict=True)]  # fmt: skip
        file = write_records(tmp_path / "x.array_record", records)
    else:
        columns = {f"x{i}": x[:, i] for i in range(3)} if kind == "parquet" else {"x": list(x)}
        file = str(tmp_path / "x.parquet")
        pq.write_table(pa.table(columns | {"kind": LABELS}), file)
    label = "label" if kind == "array_record" else "kind"
    source = Table(files=(file,), classes=3, features=3, label=label)
    rows = source.make(5, seed=0, split="train")
    epoch = np.concatenate([rows.batch_at(i)["features"] for i in range(5)])[: rows.size]
    np.testing.assert_allclose(epoch.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(epoch.std(0), [1, 1, 0], atol=1e-6)
    train, valid = (x[parts(source)[split][1]] for split in ("train", "valid"))
    want = (valid - train.mean(0)) / np.where(train.std(0) > 0, train.std(0), 1)
    found = source.make(len(valid), seed=0, split="valid").batch_at(0)["features"]
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_large_numbers_keep_their_differences(tmp_path):
    """float32 has one number every 2^26 at 1e15, and none above 3e38."""
    file, x = tmp_path / "x.parquet", np.arange(4)
    pq.write_table(pa.table({"a": 10**15 + x, "b": x * 1e100, "label": [0, 1, 0, 1]}), file)
    source = Table(files=(str(file),), valid_files=(str(file),), classes=2, features=2)
    found = source.make(4, seed=0, split="valid").batch_at(0)["features"]
    assert found.dtype == np.float32
    want = (x - 1.5) / x.std()
    np.testing.assert_allclose(found, np.stack([want, want], 1), atol=1e-6)


def test_columns_are_chosen_and_ordered(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1.0, 2, 3, 4], "b": [5, 6, 7, 9], "name": list("uvwx"),
                             "label": [0, 1, 0, 1]}), file)  # fmt: skip
    plain = dict(files=(str(file),), valid_files=(str(file),), classes=2, features=2)
    got = [Table(columns=c, **plain).make(4, seed=0, split="valid").batch_at(0)["features"]
           for c in (("a", "b"), ("b", "a"))]  # fmt: skip
    np.testing.assert_array_equal(got[0], got[1][:, ::-1])
    with pytest.raises(ValueError, match="column 'name' .string. must hold numbers"):
        Table(**plain).make(4, seed=0, split="valid")


def test_a_published_tf_example_is_read():
    """The bytes that TensorFlow's tutorial on TFRecord prints for (False, 4, b'goat', 0.9876)."""
    record = (
        b"\nR\n\x14\n\x08feature2\x12\x08\n\x06\n\x04goat\n\x11\n\x08feature0\x12\x05\x1a\x03\n\x01\x00"
        b"\n\x11\n\x08feature1\x12\x05\x1a\x03\n\x01\x04\n\x14\n\x08feature3\x12\x08\x12\x06\n\x04[\xd3|?"
    )
    found = parse_example(record)
    assert found.pop("feature3") == [pytest.approx(0.9876)]
    assert found == {"feature2": [b"goat"], "feature0": [0], "feature1": [4]}
    assert parse_example(example(a=[1.5, -2.0], b=300)) == {"a": [1.5, -2.0], "b": [300]}
    with pytest.raises(ValueError, match="not a tf.train.Example"):
        parse_example(b"plain text")


def parquet(**columns):
    def make(folder):
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return (str(folder / "x.parquet"),)

    return make


def records(*all_records):
    return lambda folder: (write_records(folder / "x.array_record", all_records),)


def text(folder):
    (folder / "x.txt").write_text("a")
    return (str(folder / "x.txt"),)


def flat(folder):
    (folder / "0.png").write_bytes(png(pixels()[0]))
    return (str(folder),)


def empty_class(folder):
    (folder / "cat").mkdir()
    return (str(folder),)


def nested(folder):
    (folder / "train" / "cat").mkdir(parents=True)
    return (str(folder),)


def broken(folder):
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for name in ("a/1.png", "b/0.png", "a/2.png"):
        (folder / name).write_bytes(png(pixels()[0])[:90])
    return (str(folder),)


def twice(folder):
    table = pa.Table.from_arrays(
        [pa.array([1.0, 2]), pa.array([3.0, 4]), pa.array([0, 1])], ["a", "a", "label"]
    )
    pq.write_table(table, folder / "x.parquet")
    return (str(folder / "x.parquet"),)


def named(name, content):
    def make(folder):
        for kind in "ab":
            (folder / kind).mkdir()
            for i in range(2):
                (folder / kind / f"{i}.{name}").write_bytes(content)
        return (str(folder),)

    return make


def huge():
    """The header of a PNG of 14000 x 14000 pixels."""
    raw = bytearray(png(pixels()[0]))
    raw[16:24] = (14000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


bomb, header = named("png", huge()), named("ppm", b"P6\nx y\n255\n")
ONE = png(pixels()[0])
CASES = {
    "nothing": (lambda folder: (str(folder / "no"),), Images, "source.files: nothing matches"),
    "text": (text, Images, "x.txt ends in none of .parquet, .array_record$"),
    "flat": (flat, Images, "must hold a folder of images for each class"),
    "empty class": (empty_class, Images, "cat holds no image"),
    "nested": (nested, Images, "train holds no image.*is source.files=.*train meant"),
    "broken": (broken, Images, "a/1.png: not an image that can be read"),
    "few": (parquet(image=[ONE] * 3, label=["a", "b", "c"]), Images, r"has 3 classes \(a, b, c\), not "
            "source.classes=2: use source.classes=3 model.classes=3"),
    "range": (parquet(image=[ONE] * 3, label=[0, 1, 2]), Images, "x.parquet:2: label 2 must be .*below "
              "source.classes=2"),
    "null": (parquet(image=[ONE] * 3, label=[0, None, 1]), Images, "x.parquet:1: source.label='label' is None"),
    "no label": (parquet(image=[ONE], kind=[0]), Images, "no source.label='label'; it has .'image', 'kind'"),
    "no column": (parquet(x=[ONE], y=[1], label=[0]), Images, "no source.column='image'"),
    "type": (parquet(image=[1, 2], label=[0, 1]), Images, "source.column='image' is int64"),
    "no image": (parquet(image=[None, ONE, None, ONE], label=[0, 1, 0, 1]), Images, "there is no image"),
    "single": (parquet(image=[ONE] * 2, label=[0, 1]), Images, "one example of each class"),
    "record": (records(b"text"), Images, "array_record:0: not a tf.train.Example"),
    "record label": (records(example(image=ONE, label=[0.5])), Images, "array_record:0: source.label.*0.5"),
    "record name": (records(example(img=ONE, y=1)), Images, "array_record:0: no source.label='label'"),
    "not parquet": (lambda folder: (write_bad(folder),), Images, "not a Parquet file"),
    "numbers": (parquet(a=[1.0] * 4, b=[2] * 4, label=[0, 1, 0, 1]), Table, "has 2 numbers beside its label: "
                "use source.features=2"),
    "gap": (parquet(a=[1.0, None, 2, 3], label=[0, 1, 0, 1]), Table, "must be finite numbers"),
    "empty": (parquet(a=pa.array([], "float64"), label=pa.array([], "int64")), Table, "there is no example"),
    "one class": (parquet(a=[1.0, 2.0], label=["x", "x"]), Table, "one class, 'x'"),
    "columns": (lambda folder: twice(folder), Table, "x.parquet: there are 2 columns 'a'"),
    "same file": (lambda folder: parquet(a=[1.0] * 4, label=[0, 1, 0, 1])(folder) * 2, Table,
                  "name .*x.parquet:0 twice"),
    "bomb": (bomb, Images, "a/0.png: not an image that can be read: .*limit"),
    "header": (header, Images, "a/0.ppm: not an image that can be read"),
    "lists": (parquet(a=[[1.0], [1.0, 2.0]], label=[0, 1]), Table, "lists of one length"),
}  # fmt: skip


def write_bad(folder):
    (folder / "x.parquet").write_bytes(b"nothing of that kind")
    return str(folder / "x.parquet")


@pytest.mark.parametrize("make,cls,message", CASES.values(), ids=CASES)
def test_what_cannot_be_read_is_named(make, cls, message, tmp_path):
    kind = {"features": 1} if cls is Table else {"image": 6}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cls(files=make(tmp_path), classes=2, **kind).make(2, seed=0, split="train")


@pytest.mark.parametrize(
    "source, message",
    [
        (Images(), "source.files=.. must name"),
        (Table(files=("x",), features=2, columns=("a", "label")), "source.columns=.*source.label"),
        (Table(files=("x",), features=2, columns=("a", "a")), "source.columns=.*different"),
        (Images(files=("",)), "source.files=.'.. must name"),
        (Images(files=("a",), classes=1), "source.classes=1"),
        (Images(files=("a",), held_out=1.0), "source.held_out=1.0"),
        (Images(files=("a",), channels=2), "source.channels=2"),
        (Images(files=("a",), split_seed=-1), "source.split_seed=-1"),
        (Table(files=("a",)), "source.features=0"),
    ],
    ids=str,
)
def test_fields_that_cannot_work_are_named_without_reading(source, message):
    with pytest.raises(ValueError, match=message):
        source.check({})
    with pytest.raises(ValueError, match="mesh.context=2 must be 1"):
        Images(files=("a",)).check({"context": 2})


def test_model_and_source_must_agree_on_colours():
    with pytest.raises(ValueError, match="model.channels=1 must equal source.channels=3"):
        Classify().check(ViTTTConfig(image=32), Images(files=("a",)))
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\) must be \[b, 8, 8, 3\]"):
        model = ViTTTConfig(image=8, channels=3).build("cpu")
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8)))


def mine(folder):
    """The preset `digits` on images of one's own, as the command has it."""
    for name in ("mine", "strange"):
        (folder / name).mkdir()
        write_images("folder", folder / name, pixels())
    return ["source=Images", "source.files=mine", "source.ood_files=strange", "source.classes=3",
            "source.image=6", "source.held_out=0.3", "model.classes=3", "model.features=108",
            "model.d_model=8", "evaluators.1.critical=2", "evaluators.1.posterior.samples=3",
            "steps=6", "batch=8", "save_every=3", "log_every=1", "eval_every=0"]  # fmt: skip


def test_a_folder_trains_and_resumes_within_an_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = override(presets()["digits"].make(), mine(tmp_path))
    run = dataclasses.replace(run, evaluators=(HeldOut(0),))
    folder = tmp_path / "run"
    out = trainer.fit(run, folder, quiet=True)
    losses = series(read(folder), "train", "loss")[1]
    assert len(losses) == 6 and out.values["valid/accuracy"] >= 0
    shutil.rmtree(folder / "checkpoints" / "6")
    assert trainer.fit(run, folder, quiet=True).values == out.values
    assert series(read(folder), "train", "loss")[1][-3:] == losses[-3:]


@pytest.mark.slow
def test_the_command_trains_on_a_folder_and_questions_the_model(tmp_path, monkeypatch, capsys):
    """With strangers to detect."""
    monkeypatch.chdir(tmp_path)
    assert main(presets(), ["train", "digits", *mine(tmp_path), "--quiet"]) == 0
    capsys.readouterr()
    assert main(presets(), ["eval", "runs/digits"]) == 0
    said = capsys.readouterr().out
    assert "uncertainty/ood_auroc/mi" in said and "uncertainty/class/2/c" in said
    assert (tmp_path / "runs/digits/uncertainty/most_uncertain.png").is_file()
