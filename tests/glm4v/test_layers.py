"""Projections that are made as one product: the same values, and three products again wherever that might not hold."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4v import Glm4v, layers, weights
from glm4v_ext.testing import devices


@pytest.fixture
def plain(tiny_checkpoint):
    return Glm4v.from_pretrained(tiny_checkpoint)


@pytest.fixture
def adjoined(tiny_checkpoint):
    """As it is loaded onto a device that is not the CPU."""
    model = Glm4v.without_weights(tiny_checkpoint)
    for layer in model.language_model.layers:
        layers.adjoin(layer.self_attn.projections, torch.float32, "cpu")
    weights.load(model, tiny_checkpoint)
    return model.eval()


@pytest.fixture
def products(monkeypatch):
    """Of each call since: how many outputs."""
    seen, op = [], layers.linear

    def linear(x, weight, bias=None):
        seen.append(len(weight))
        return op(x, weight, bias)

    monkeypatch.setattr(layers, "linear", linear)
    return seen


def two_prompts(model):
    ids = torch.arange(9, device=model.device) + 20
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(3, -1).to(model.device)
    return {"input_ids": ids, "cu_seqlens": torch.tensor([0, 4, 9]), "position_ids": positions}


def answers(model):
    """Logits of a prompt of two sequences and of two decode steps behind it."""
    cache = model.new_cache(2, 8)
    batch = two_prompts(model)
    steps = (torch.tensor([[length, length + 1]] * 3, device=model.device) for length in (4, 5))
    tokens = torch.tensor([3, 4], device=model.device)
    return [model.prefill(batch, cache), *(model.decode(tokens, positions, cache) for positions in steps)]


def outputs(model):
    attention = model.language_model.layers[0].self_attn
    return [len(projection.weight) for projection in attention.projections]


def test_one_product(plain, adjoined, products):
    count, each = len(plain.language_model.layers), outputs(plain)
    expected = answers(plain)
    three = products.copy()
    products.clear()
    found = answers(adjoined)
    assert len(products) == len(three) - 2 * count * len(found)
    assert products.count(sum(each)) - three.count(sum(each)) == count * len(found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_bits_are_the_same_with_gradients_and_without(grad, plain, adjoined, products):
    with torch.set_grad_enabled(grad):
        expected = plain(**two_prompts(plain))
        three = products.copy()
        products.clear()
        assert torch.equal(adjoined(**two_prompts(adjoined)), expected) and products == three


def test_training(plain, adjoined):
    trained = []
    for model in (plain, adjoined):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            model(**two_prompts(model)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_a_change_of_one_is_none_of_the_others(adjoined):
    """For autograd, too: an optimizer may step as soon as a gradient is there, others still waiting for theirs."""
    q, k, _ = (projection.weight for projection in adjoined.language_model.layers[0].self_attn.projections)
    k_before, version = k.detach().clone(), k._version
    with torch.no_grad():
        q.add_(1)
    assert torch.equal(k, k_before) and k._version == version


def test_the_checkpoint_stays_what_it_is(plain, adjoined, tmp_path):
    kept = plain.state_dict()
    assert list(kept) == list(adjoined.state_dict())
    for name, tensor in adjoined.state_dict().items():
        assert torch.equal(tensor, kept[name]) and tensor.shape == kept[name].shape
    for folder, model in (("plain", plain), ("adjoined", adjoined)):
        model.save_pretrained(tmp_path / folder)
    written = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "adjoined")]
    assert written[0] == written[1]
    parameters = [
        p.detach()
        for projection in adjoined.language_model.layers[0].self_attn.projections
        for p in projection.parameters()
    ]
    torch.save(parameters, together := io.BytesIO())
    torch.save([p.clone() for p in parameters], apart := io.BytesIO())
    assert len(together.getvalue()) <= len(apart.getvalue())  # what is shared is written once
    save_file(adjoined.state_dict(), tmp_path / "others.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_file(tmp_path / "others.safetensors").items())
    adjoined.load_state_dict({name: tensor + 1 for name, tensor in kept.items()})
    assert all(torch.equal(tensor, kept[name] + 1) for name, tensor in adjoined.state_dict().items())


def moved(model):
    return model.to(torch.bfloat16)


def copied(model):
    return copy.deepcopy(model)


def moved_by_data(model):
    """To the same place of other memory."""
    q, k, _ = (projection.weight for projection in model.language_model.layers[0].self_attn.projections)
    k.data = torch.cat([q, k + 1]).detach()[len(q) :]
    return model


def hooked(model):
    model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, out: out + 1)
    return model


def hooked_before(model):
    model.language_model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model


def put_in_place(model):
    v_proj = model.language_model.layers[0].self_attn.v_proj
    forward = v_proj.forward
    v_proj.forward = lambda x: 2 * forward(x)
    return model


class Doubled(layers.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def of_another_class(model):
    model.language_model.layers[0].self_attn.v_proj.__class__ = Doubled
    return model


def without_bias(model):
    model.language_model.layers[0].self_attn.k_proj.bias = None
    return model


def swapped(model):
    """Adjacent still, but in another order."""
    attention = model.language_model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    return model


CHANGES = [
    moved, copied, moved_by_data, hooked, hooked_before, put_in_place, of_another_class, without_bias, swapped,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_three_products_after(change, plain, adjoined, products):
    plain, adjoined = change(plain), change(adjoined)
    expected, three = answers(plain), products.copy()
    products.clear()
    found = answers(adjoined)
    rest = 0 if change in (moved, copied) else len(plain.language_model.layers) - 1  # which nobody has changed
    assert len(products) == len(three) - 2 * rest * len(found)
    torch.testing.assert_close(found, expected)


def test_hooks_on_every_module(adjoined, products):
    count, seen = sum(outputs(adjoined)), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module))
    try:
        answers(adjoined)
    finally:
        handle.remove()
    assert adjoined.language_model.layers[0].self_attn.q_proj in seen and count not in products


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_who_is_adjoined(device, tiny_checkpoint, monkeypatch):
    """On the CPU weights stay in the file."""
    seen = []
    monkeypatch.setattr(weights, "adjoin", lambda projections, dtype, device: seen.append((dtype, device)))
    model = Glm4v.from_pretrained(tiny_checkpoint, device=device)
    assert seen == [(torch.float32, device)] * (len(model.language_model.layers) if device == "meta" else 0)


@pytest.mark.parametrize("device", devices())
def test_loaded_onto_a_device(device, tiny_checkpoint, products):
    model = Glm4v.from_pretrained(tiny_checkpoint, torch.bfloat16, device)
    found = answers(model)
    assert (sum(outputs(model)) in products) == (device != "cpu")
    products.clear()
    exact = answers(Glm4v.from_pretrained(tiny_checkpoint, torch.float32))
    rounded = answers(Glm4v.from_pretrained(tiny_checkpoint, torch.bfloat16))
    for here, there, truth in zip(found, rounded, exact, strict=True):
        assert (here.cpu().float() - truth).abs().max() <= 2 * (there.float() - truth).abs().max()
