"""The cache: it knows all that its content depends on, and a damaged file is made again, not trained on."""

import io
import os
import shutil
import time
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from tokenizers import normalizers

from conftest import build_pipe, draw_pairs
from powersteer import PowersteerError
from powersteer.core.console import PlainConsole
from powersteer.data import contents as contents_module
from powersteer.data.cache import fault_of, sweep, tokenizer_digest, write_tensors
from powersteer.data.contents import Contents
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs, Views
from powersteer.data.rows import Picture
from powersteer.training.run import train

SIZE = (32, 32)


def keys(pipe, folder, cache, **options):
    """The names of the files that serve these pairs: of pictures, of captions."""
    encoded = encode_pairs(pipe, Pairs(folder, SIZE, **options), cache)
    pictures = {file.name for file, _ in encoded._shards.values()}
    return pictures, {file.name for file, _ in encoded._captions.values()}


def test_the_key_knows_configurations_and_tokenizers(pairs_dir, tmp_path):
    cache = tmp_path / "cache"
    pictures, texts = keys(build_pipe(), pairs_dir, cache)
    assert keys(build_pipe(), pairs_dir, cache) == (pictures, texts)
    used = build_pipe()
    used.tokenizer(["a fox"], padding="max_length", truncation=True, max_length=5)  # leaves a state behind
    assert keys(used, pairs_dir, cache) == (pictures, texts)

    def scaled(pipe):
        pipe.vae.register_to_config(scaling_factor=2 * pipe.vae.config.scaling_factor)

    def shorter(pipe):
        pipe.tokenizer.model_max_length = 11

    def lower(pipe):
        pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("fox", "cat")])

    def quick(pipe):
        pipe.text_encoder.config.layer_norm_eps = 0.1

    def weights(pipe):
        pipe.text_encoder.get_input_embeddings().weight.data[5, 0] += 1

    def half(pipe):
        pipe.vae.to(torch.float16).to(torch.float32)  # rounded weights are others

    for change, of_pictures, of_texts in (
        (scaled, True, False),
        (shorter, False, True),
        (lower, False, True),
        (quick, False, True),
        (weights, False, True),
        (half, True, False),
    ):
        pipe = build_pipe()
        change(pipe)
        changed = keys(pipe, pairs_dir, cache)
        assert (changed[0] != pictures, changed[1] != texts) == (of_pictures, of_texts), change.__name__
    for options in ({"kind": "segmentation"}, {"conditioning_channels": 3}, {"views": Views(random_flip=True)}):
        changed = keys(build_pipe(), pairs_dir, cache, **options)
        assert changed[0].isdisjoint(pictures) and changed[1] == texts


def test_a_doubled_scaling_factor_doubles_the_latents(pairs_dir, tmp_path):
    pipe, pairs = build_pipe(), Pairs(pairs_dir, SIZE)
    before = encode_pairs(pipe, pairs, tmp_path / "cache")[3, 0].image
    pipe.vae.register_to_config(scaling_factor=2 * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(encode_pairs(pipe, pairs, tmp_path / "cache")[3, 0].image, 2 * before)


def test_a_tokenizer_without_its_words_is_another():
    one, other = build_pipe().tokenizer, build_pipe().tokenizer
    assert tokenizer_digest(one) == tokenizer_digest(other)
    other.add_tokens(["<sks>"])
    assert tokenizer_digest(one) != tokenizer_digest(other)


def region(file, tensor):
    """Where a tensor's bytes lie in a file."""
    content = file.read_bytes()
    with safe_open(file, "pt") as opened:
        whole = opened.get_tensor(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content.index(whole), len(whole)


@pytest.mark.parametrize("tensor", ["latents", "conditions", "offsets", "encoder_hidden_states", "header", "cut"])
def test_a_damaged_file_is_found_said_and_made_again(pairs_dir, tmp_path, tensor):
    pipe, pairs, cache = build_pipe(), Pairs(pairs_dir, SIZE), tmp_path / "cache"
    whole = encode_pairs(pipe, pairs, cache)
    wanted = deepcopy(([whole[i, 0] for i in range(12)], whole.texts(["a fox"])["encoder_hidden_states"]))
    file = next(cache.glob("text-*" if tensor.startswith("encoder") else "latents-*"))
    content, before = bytearray(file.read_bytes()), file.read_bytes()
    if tensor == "cut":
        del content[len(content) // 2 :]
    elif tensor == "header":
        place = content.index(b'"F32"')
        content[place + 1 : place + 4] = b"I32"
    else:
        start, count = region(file, tensor)
        if tensor == "latents":
            content[start : start + min(4096, count)] = bytes(min(4096, count))
        else:
            content[start + count // 2] ^= 1
    assert bytes(content) != before
    file.write_bytes(content)
    console = PlainConsole(file=io.StringIO(), width=300)
    again = encode_pairs(pipe, pairs, cache, console=console)
    assert f"the cache file {file} is damaged" in console.file.getvalue()
    for one, other in zip(wanted[0], (again[i, 0] for i in range(12)), strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.condition, other.condition)
    assert torch.equal(again.texts(["a fox"])["encoder_hidden_states"], wanted[1])
    assert fault_of(file) is None


def test_each_flipped_bit_of_a_file_is_found(tmp_path):
    file = tmp_path / "one.safetensors"
    write_tensors(file, {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.zeros(0)})
    assert fault_of(file) is None and fault_of(tmp_path / "none") == "it is missing"
    content, silent = file.read_bytes(), []
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            if fault_of(file) is None:
                silent.append((place, bit))
    assert silent == []


def test_damage_while_a_run_reads_is_one_line(pairs_dir, tmp_path):
    encoded = encode_pairs(build_pipe(), Pairs(pairs_dir, SIZE), tmp_path / "cache")
    file = next((tmp_path / "cache").glob("latents-*"))
    start, count = region(file, "conditions")
    content = bytearray(file.read_bytes())
    content[start : start + count] = bytes(count)
    file.write_bytes(content)
    with pytest.raises(PowersteerError, match=r"was whole when the run began .*: give the same command again"):
        encoded[0, 0]


def test_what_a_kill_leaves_in_the_cache_is_swept(pairs_dir, tmp_path):
    cache = tmp_path / "cache"
    encode_pairs(build_pipe(), Pairs(pairs_dir, SIZE), cache)
    left = cache / "latents-0123.partial"
    left.write_bytes(b"half")
    sweep(cache)
    assert not left.exists() and len(list(cache.glob("*.safetensors"))) == 2


def test_the_cache_is_read_by_whom_the_umask_lets(pairs_dir, tmp_path):
    encode_pairs(build_pipe(), Pairs(pairs_dir, SIZE), tmp_path / "cache")
    mask = os.umask(0)
    os.umask(mask)
    for file in (tmp_path / "cache").glob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_dangling_link_is_named(config, tmp_path):
    folder = tmp_path / "pairs"
    source = draw_pairs(tmp_path / "source", 8)
    shutil.copytree(source / "images", folder / "images")
    shutil.copytree(source / "drawings", folder / "conditioning_images")
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "3.png").symlink_to(tmp_path / "gone.png")
    for buckets in (True, False):
        change = {"train_data_dir": str(folder), "default_prompt": "a fox", "aspect_ratio_buckets": buckets}
        with pytest.raises(PowersteerError, match=r"3\.png' .*(cannot be read|not found|does not exist|dangling)"):
            train(config.model_copy(update=change))
    picture = Picture("3.png", "image", (folder / "images" / "3.png").read_bytes, folder / "images" / "3.png")
    with pytest.raises(PowersteerError, match="cannot be read: No such file or directory"):
        Contents().size(picture)


def test_a_picture_that_changes_under_its_old_size_and_time_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"one")
    picture = lambda: Picture(str(file), "image", file.read_bytes, file)  # noqa: E731
    store = tmp_path / "contents.json"

    def digest():
        return Contents(store).digests([picture()])[0]

    first = digest()
    assert "a.bin" not in (store.read_text() if store.exists() else "")  # it may still change within the clock's tick
    monkeypatch.setattr(contents_module, "_SETTLED", 0)
    assert digest() == first and "a.bin" in store.read_text()
    time.sleep(0.05)
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest() != first


@pytest.mark.parametrize("said", ["[]", '{"a": 5}', "{", "[" * 100_000, '{"a": ["x", 1]}', ""])
def test_what_is_remembered_of_pictures_may_be_damaged(tmp_path, said):
    (tmp_path / "contents.json").write_text(said)
    (tmp_path / "a.bin").write_bytes(b"one")
    picture = Picture("a", "image", (tmp_path / "a.bin").read_bytes, tmp_path / "a.bin")
    assert Contents(tmp_path / "contents.json").digests([picture]) == Contents().digests([picture])


def test_a_vae_that_shifts_its_latents_is_refused(pairs_dir):
    pipe = build_pipe()
    pipe.vae.register_to_config(shift_factor=0.1)
    with pytest.raises(PowersteerError, match="the base's VAE has a shift_factor, which is not supported"):
        encode_pairs(pipe, Pairs(pairs_dir, SIZE))
