"""Extractors of features: real small networks, and stand-ins with the names of packages that are not there."""

import pickle
import sys
import types

import pytest
import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from powersteer import PowersteerError
from powersteer.backbones.load import load_clip
from powersteer.core.files import embedded
from powersteer.evaluation.features import Clip, HedTrunk, Inception, load_features, weights_sha256


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_any_clip_sees_and_reads_as_transformers_does(clip_dir):
    clip, peer = Clip.load(str(clip_dir)), CLIPModel.from_pretrained(clip_dir).eval()
    pixels = ((pictures(3, 3, 32, 32) + 1) * 127.5).round().to(torch.uint8)
    processor = CLIPImageProcessor.from_pretrained(clip_dir)
    prompts = ["a fox", "the moon", "two fish"]
    given = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = processor(list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        wanted = peer(**given, **seen)
    cosine = wanted.logits_per_image.diagonal() / peer.logit_scale.exp()
    score = clip.score(pixels.float() / 127.5 - 1, prompts)
    torch.testing.assert_close(score, 100 * cosine.clamp_min(0), atol=1e-3, rtol=0)
    assert clip(pictures(2, 3, 40, 70)).shape == (2, 16)  # shorter side to 32, centre cut out


def test_the_embedded_clip_knows_its_own_captions():
    clip = Clip.load("powersteer-tiny")
    assert clip.record()["weights_sha256"] == weights_sha256(load_clip(embedded("powersteer-tiny"))[0])
    red, blue = torch.full((2, 3, 64, 64), -1.0).unbind()
    red[0], blue[2] = 1, 1
    pair = torch.stack([red, blue])
    own, other = clip.score(pair, ["red square", "blue square"]), clip.score(pair, ["blue square", "red square"])
    assert (own > other).all() and own.max() <= 100 and other.min() >= 0


def test_a_base_without_a_clip_says_so(base_dir):
    with pytest.raises(PowersteerError, match="cannot load a CLIP from"):
        Clip.load(str(base_dir))
    with pytest.raises(PowersteerError, match="--clip"):
        load_features("clip")


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)])


def test_the_trunk_of_hed_is_given_bgr_and_averaged(monkeypatch):
    torch.manual_seed(0)
    network = Trunk()
    hed = types.ModuleType("powersteer.conditions.extractors.hed")
    hed.MEAN_BGR, hed.packaged_weights = (104.0, 116.0, 122.0), lambda: "weights.h5"
    hed.HEDNetwork = types.SimpleNamespace(from_keras=lambda file: network)
    monkeypatch.setitem(sys.modules, "powersteer.conditions.extractors.hed", hed)
    trunk = load_features("hed")
    assert isinstance(trunk, HedTrunk) and trunk.record()["weights_sha256"] == weights_sha256(network)
    seen = pictures(2, 3, 9, 8)
    bgr = (seen[:, [2, 1, 0]] + 1) * 127.5 - torch.tensor([104.0, 116, 122])[:, None, None]
    h = nn.functional.max_pool2d(network.blocks[0](bgr), 2, ceil_mode=True)
    torch.testing.assert_close(trunk(seen), network.blocks[1](h).mean((2, 3)))


class Network(nn.Module):
    """Takes what torch-fidelity's takes."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.scale = nn.Parameter(torch.ones(1))
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return (self.scale * pixels.float().mean((2, 3)),)


@pytest.fixture
def torch_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)


def test_inception_reads_bytes_with_given_weights(torch_fidelity, tmp_path):
    torch.save({"scale": torch.tensor([2.0])}, tmp_path / "weights.pth")
    inception = load_features("inception", inception_weights=tmp_path / "weights.pth")
    torch.testing.assert_close(inception(torch.ones(2, 3, 8, 8)), torch.full((2, 3), 510.0))
    assert inception.record()["weights_sha256"] != Inception().record()["weights_sha256"]


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_what_are_no_weights_of_inception_is_refused(torch_fidelity, tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"scale": torch.tensor([torch.nan])}, tmp_path / "nan.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "nan.pth").read_bytes()[:-200])
    for name in ("evil.pth", "other.pth", "missing.pth", "nan.pth", "short.pth", ".", "a\0b", "x" * 5000):
        with pytest.raises(PowersteerError, match="cannot load Inception's weights"):
            Inception(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out


def test_inception_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(PowersteerError, match=r"pip install 'powersteer\[fid\]'"):
        Inception()


def test_the_hash_of_weights_is_theirs():
    torch.manual_seed(0)
    one, other = nn.Linear(2, 3), nn.Linear(2, 3).bfloat16()
    assert weights_sha256(one) == weights_sha256(one) != weights_sha256(other)
    before = weights_sha256(one)
    one.weight.data[0, 0] += 1
    assert weights_sha256(one) != before and len(before) == 64
