"""What the engine promises beside exact rows: threads, traces, changes, compiled code, schedules, no waits."""

import copy
import pickle
import threading
from collections import Counter

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch._dynamo.utils import counters

from conftest import randomise
from powersteer import BPSModel, PowersteerError, SteeringPlan, steer
from powersteer.adapters import plan as plan_module
from powersteer.adapters.clock import Clock, progress
from powersteer.adapters.watch import weights_digest
from waits import Waits

CALL = "_compiled_call_impl"


def condition_of(seed: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def unet_inputs(batch: int = 2, timestep: int = 500):
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.tensor(timestep), torch.randn(batch, 6, 24, generator=generator)


def pictures(pipe, prompts=("a fox",), steps=3, guidance_scale=4.0, **kwargs):
    return pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="pt",
        **kwargs,
    ).images


@torch.no_grad()
def test_a_block_acts_in_its_own_thread_alone(pipe, model):
    """Two threads steer the same U-Net with drawings of their own, a third does not steer."""
    prompts = ["a fox", "the moon", "two fish"]
    drawings = [condition_of(0), condition_of(1), None]
    pipes = [StableDiffusionPipeline(**pipe.components, requires_safety_checker=False) for _ in prompts]
    for one in pipes:
        one.scheduler = copy.deepcopy(pipe.scheduler)
        one.set_progress_bar_config(disable=True)

    def make(i):
        if drawings[i] is None:
            return pictures(pipes[i], [prompts[i]], steps=6)
        with steer(pipes[i], model, drawings[i]):
            return pictures(pipes[i], [prompts[i]], steps=6)

    alone = [make(i) for i in range(3)]
    for _ in range(2):
        together = [None] * 3
        begin = threading.Barrier(3)

        def run(i, begin=begin, together=together):
            begin.wait()
            together[i] = make(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for got, wanted in zip(together, alone, strict=True):
            torch.testing.assert_close(got, wanted)


@torch.no_grad()
def test_a_call_that_is_under_way_when_another_thread_begins_to_steer_stays_as_it_was(pipe, model):
    inputs = unet_inputs()
    prior = pipe.unet(*inputs).sample
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread().name == "unsteered":
            inside.set()
            go_on.wait(10)

    found = []
    with pipe.unet.conv_in.register_forward_hook(wait):
        thread = threading.Thread(target=lambda: found.append(pipe.unet(*inputs).sample), name="unsteered")
        thread.start()
        inside.wait(10)
        with steer(pipe.unet, model, condition_of(0)):

            def let_the_other_go_on(*_):
                if threading.current_thread() is not thread:
                    go_on.set()
                    thread.join(10)

            with pipe.unet.conv_in.register_forward_hook(let_the_other_go_on):
                steered = pipe.unet(*inputs).sample  # the other call ends while hooks of this one are in place
    thread.join()
    assert torch.equal(found[0], prior) and not torch.equal(steered, prior)


@torch.no_grad()
def test_copies_and_pickles_made_within_a_block_are_of_the_bare_unet(pipe, model):
    inputs = unet_inputs()
    prior = pipe.unet(*inputs).sample
    with steer(pipe, model, condition_of(0)):
        steered = pipe.unet(*inputs).sample
        made = [copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet)), copy.copy(pipe.unet)]
        compiled = torch.compile(pipe.unet, backend="eager")
        torch.testing.assert_close(compiled(*inputs).sample, steered)
    for unet in (*made[:2], pipe.unet, compiled):
        assert torch.equal(unet(*inputs).sample, prior)
        assert unet is compiled or CALL not in unet.__dict__
    assert torch.equal(made[2](*inputs).sample, prior)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_a_trained_unet_is_left_without_hooks_when_gradient_checkpointing_ran_layers_again(pipe, model):
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    with steer(pipe.unet, model.train(), condition_of(0)):
        pipe.unet(*unet_inputs()).sample.mean().backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@torch.no_grad()
def test_a_condition_changed_in_place_is_noticed(pipe, model):
    first, second = condition_of(0), condition_of(1)
    alone = []
    for one in (first, second):
        with steer(pipe, model, one, plan=None):
            alone.append(pictures(pipe))
    plan, changed = SteeringPlan(), first.clone()
    with steer(pipe, model, changed, plan=plan):
        assert torch.equal(pictures(pipe), alone[0])
        changed.copy_(second)
        assert torch.equal(pictures(pipe), alone[1])
    with steer(pipe, model, first, plan=plan):  # the plan still knows which is which
        assert torch.equal(pictures(pipe), alone[0])
    array = (first * 255).round().byte().numpy()[0, 0]
    with steer(pipe, model, array):
        kept = pictures(pipe)
        array[:] = 0  # arrays are read when the block begins
        assert torch.equal(pictures(pipe), kept)
    with torch.inference_mode():
        changed = first.clone()
        with steer(pipe, model, changed):
            assert torch.equal(pictures(pipe), alone[0])
            changed.copy_(second)
            assert torch.equal(pictures(pipe), alone[1])


@torch.no_grad()
def test_weights_changed_within_a_block_are_noticed(pipe, model):
    with steer(pipe, model, condition_of(0)):
        before = pictures(pipe)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = pictures(pipe)
    with steer(pipe, model, condition_of(0), plan=None):
        assert torch.equal(pictures(pipe), after)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_digest_covers_every_weight(model):
    known = {weights_digest(model)}
    tensors = list(model.parameters())
    for tensor in tensors:
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            kept = tensor.flatten()[place].clone()
            tensor.view(-1)[place] += 1e-4
            known.add(weights_digest(model))
            tensor.view(-1)[place] = kept
    assert len(known) == 1 + 3 * sum(tensor.numel() > 2 for tensor in tensors) + sum(
        tensor.numel() for tensor in tensors if tensor.numel() <= 2
    )
    layer = next(tensor for tensor in tensors if tensor.ndim == 4 and len(tensor) > 4)
    layer[:3] = 0
    assert (zeroed := weights_digest(model)) not in known
    layer[3] = layer[3].flip(0)  # the same numbers in another order
    assert weights_digest(model) not in {*known, zeroed}


@torch.no_grad()
@pytest.mark.parametrize("how", ["torch.compile(unet)", "unet.compile()"])
def test_fullgraph_compiles_once(pipe, model, how):
    torch._dynamo.reset()
    inputs = unet_inputs()
    prior = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, condition_of(0)):
        wanted = pipe.unet(*inputs).sample
    inner = pipe.unet
    if how == "unet.compile()":
        inner.compile(fullgraph=True, backend="eager")
    else:
        pipe.unet = torch.compile(inner, fullgraph=True, backend="eager")
    counters.clear()
    torch.testing.assert_close(pipe.unet(*inputs).sample, prior)
    plain = counters["stats"]["unique_graphs"]
    graphs = []
    for seed, scale in ((0, 1.0), (1, 1.0), (0, 0.5)):
        with steer(pipe, model, condition_of(seed), scale):
            got = pipe.unet(*inputs).sample
            pipe.unet(inputs[0], torch.tensor(300), inputs[2])
        if (seed, scale) == (0, 1.0):
            torch.testing.assert_close(got, wanted)
        graphs.append(counters["stats"]["unique_graphs"] - plain)
        torch.testing.assert_close(pipe.unet(*inputs).sample, prior)
    assert plain == 1 and graphs == [1, 1, 1], (plain, graphs)
    assert not counters["graph_break"]
    pipe.unet = inner
    torch._dynamo.reset()


def test_every_step_of_a_schedule_has_its_place_by_the_noise_level():
    """σ of each scheduler's own table, against where the same σ lies on a variance-preserving or an EDM schedule."""
    base = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    plain = EulerDiscreteScheduler(**base)
    continuous = EulerDiscreteScheduler(**base, timestep_type="continuous", prediction_type="v_prediction")
    sigmas = ((1 - plain.alphas_cumprod) / plain.alphas_cumprod).sqrt()
    continuous.set_timesteps(7)
    for timestep, sigma in zip(continuous.timesteps, continuous.sigmas, strict=False):
        nearest = (sigmas.log() - sigma.log()).abs().argmin().item()
        assert abs(progress(timestep.item(), continuous) - (1 - nearest / 1000)) < 2e-3
    for scheduler in (EDMEulerScheduler(), EDMDPMSolverMultistepScheduler()):
        scheduler.set_timesteps(9)
        ways = [progress(timestep.item(), scheduler) for timestep in scheduler.timesteps]
        torch.testing.assert_close(torch.tensor(ways), torch.linspace(0, 1, 9), atol=1e-3, rtol=0)
    consistency = CMStochasticIterativeScheduler()
    consistency.set_timesteps(3)
    ways = [progress(timestep.item(), consistency) for timestep in consistency.timesteps]
    assert abs(ways[0]) < 1e-3 and ways == sorted(ways) and ways[-1] < 1
    assert progress(250, None) == 0.75
    with pytest.raises(ValueError, match="1200 is no timestep of 0 to 1000"):
        progress(1200, plain)


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), HeunDiscreteScheduler()], ids=["EDM", "two a step"])
def test_start_and_end_under_other_schedulers(pipe, model, scheduler):
    pipe.scheduler = scheduler
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with steer(pipe, model, condition_of(0), start=0.3, end=0.7, plan=None):
        pictures(pipe, steps=10)
    calls = len(scheduler.timesteps)
    assert 0.25 * calls <= len(seen) <= 0.55 * calls
    seen.clear()
    with steer(pipe, model, condition_of(0), plan=SteeringPlan()):
        pictures(pipe, steps=10)
    assert len(seen) == len(set(scheduler.timesteps.tolist()))  # of doubled timesteps each is evaluated once


@torch.no_grad()
def test_a_sibling_is_steered_as_the_pipeline_itself(pipe, model):
    sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    given = {"image": torch.zeros(2, 3, 32, 32), "strength": 0.9, "steps": 4}
    conditions, prompts = condition_of(3, 2), ["a fox", "the moon"]
    made = []
    for named in (pipe, sibling):
        with steer(named, model, conditions):
            made.append(pictures(sibling, prompts, **given))
    assert torch.equal(*made)


@torch.no_grad()
def test_halves_in_two_calls_on_a_bare_unet(pipe, model):
    sample, timestep, text = unet_inputs(1)
    with steer(pipe.unet, model, condition_of(0)):
        whole = pipe.unet(sample, timestep, text).sample
    prior = pipe.unet(sample, timestep, text).sample
    with (
        steer(pipe.unet, model, condition_of(0), steer_unconditional=False),
        pytest.raises(PowersteerError, match=r"cannot be told.*unconditional=\[True, False\]"),
    ):
        pipe.unet(sample, timestep, text)
    for marks, wanted in (([False], whole), ([True], prior)):
        with steer(pipe.unet, model, condition_of(0), steer_unconditional=False, unconditional=marks):
            torch.testing.assert_close(pipe.unet(sample, timestep, text).sample, wanted)
    with steer(pipe, model, condition_of(0)):  # a pipeline's call leaves nothing that a loop of one's own would meet
        pictures(pipe)
        torch.testing.assert_close(pipe.unet(sample, timestep, text).sample, whole)


@torch.no_grad()
def test_steering_guidance_refuses_what_would_change_its_formula(pipe, model):
    with (
        steer(pipe, model, condition_of(0), steering_guidance_scale=2.0),
        pytest.raises(PowersteerError, match="guidance_rescale and steering_guidance_scale do not go together"),
    ):
        pictures(pipe, guidance_rescale=0.7)


def test_an_offloaded_network_and_what_is_none(pipe, model):
    accelerate = pytest.importorskip("accelerate")
    with steer(pipe, model, condition_of(0)):
        wanted = pictures(pipe)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with steer(pipe, model, condition_of(0)):
        torch.testing.assert_close(pictures(pipe), wanted)
    with (
        pytest.raises(PowersteerError, match="a Linear is no adapter"),
        steer(pipe, torch.nn.Linear(1, 1), condition_of(0)),
    ):
        pass


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kept", ["warm", "no plan"])
def test_a_step_waits_for_nothing(pipe, model, monkeypatch, count, kept):
    """After a picture's first step: no number leaves the device, and nobody asks how much memory is free."""
    asked = Counter()
    monkeypatch.setattr(plan_module.psutil, "virtual_memory", lambda: asked.update(["memory"]))
    plan = SteeringPlan(memory_limit=10**9) if kept == "warm" else None
    prompts, waits = ["a fox", "the moon"][:count], []

    def steps(steered):
        counting: list[Waits] = []

        def after_step(_, step, __, given):
            if counting:
                counting.pop().__exit__(None, None, None)
            if step < 3:
                counting.append(Waits())
                counting[-1].__enter__()
                waits.append(counting[-1])
            return given

        pictures(pipe, prompts, steps=5, callback_on_step_end=after_step)
        return sum((one.found for one in waits), Counter())

    bare = steps(False)
    waits.clear()
    with steer(pipe, model, condition_of(0, count), plan=plan):
        pictures(pipe, prompts, steps=5)
        assert steps(True) == bare
    assert not asked


@torch.no_grad()
def test_a_schedule_is_read_once():
    clock, timesteps = Clock(), torch.linspace(999, 0, 50).round()
    reads = []
    for timestep in timesteps:
        assert clock.read(timestep) == [timestep.item()]
        reads.append(clock.fresh)
    assert reads == [True] + [False] * 49
    assert clock.following(timesteps[3]) == timesteps[4].item() and clock.following(timesteps[49]) is None
    timesteps[7] = 5.0
    assert clock.read(timesteps[7]) == [5.0]
    assert clock.read(timesteps[9].expand(4)) == [timesteps[9].item()] * 4
    assert clock.read(torch.tensor([3, 900])) == [3.0, 900.0] and clock.read(12) == [12.0]


@torch.no_grad()
def test_two_networks_of_different_kinds_together(pipe, model):
    from powersteer.adapters.registry import make_adapter

    torch.manual_seed(3)
    other = randomise(make_adapter(pipe.unet, preset="controlnet", pixel_unshuffle=4), seed=4)
    inputs, one, two = unet_inputs(), condition_of(0), condition_of(1)
    with steer(pipe.unet, [model, other], [one, two], scale=[1.0, 0.5]):
        together = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, one), steer(pipe.unet, other, two, scale=0.5):
        nested = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, one):
        alone = pipe.unet(*inputs).sample
    torch.testing.assert_close(together, nested)
    assert (together - alone).abs().max() > 1e-4
    with steer(pipe.unet, other, two, scale=0.5, end=0.4):
        assert torch.equal(pipe.unet(*inputs).sample, pipe.unet.forward(*inputs).sample)  # at 500, it has ended


@torch.no_grad()
def test_of_distilled_unets_each_row_has_its_own_guidance(pipe):
    from conftest import build_unet

    unet = build_unet(time_cond_proj_dim=8)
    model = randomise(BPSModel.from_unet(unet, pixel_unshuffle=4, weights="uniform"))
    sample, timestep, text = unet_inputs(2)
    guidance = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    with steer(unet, model, condition_of(0)):
        together = unet(sample, timestep, text, timestep_cond=guidance).sample
        alone = [
            unet(*(x[i : i + 1] for x in (sample, timestep.expand(2), text)), timestep_cond=guidance[i : i + 1]).sample
            for i in (0, 1)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
