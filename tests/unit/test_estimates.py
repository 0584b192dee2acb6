"""Sizes, work and memory against real models; what jobs ask for against what jobs took."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fedamole import stages
from fedamole.artifacts import Header, write_record
from fedamole.batches import collate
from fedamole.cli import main
from fedamole.cli.calibration import _Trial
from fedamole.cli.plan import _costs
from fedamole.cli.study import read_benchmarks, read_study
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.hmole_peft import HMoLEConfig
from fedamole.planning.memory import (
    ZeRO,
    activation_bytes,
    gpu_memory,
    job_memory_mb,
    pass_of,
    training_bytes,
)
from fedamole.planning.model_size import ModelSize, model_size, of_dimensions
from fedamole.planning.times import Clock, assumed_machine, job_minutes
from fedamole.planning.workload import (
    Passes,
    RunWork,
    assumed_data,
    embedding_passes,
    examples_of,
    job_counts,
    largest_jobs,
    shards,
    steps_of,
    training_passes,
    works_of,
)
from fedamole.settings import BackboneSettings, BackboneSize, ParticipationSettings
from fedamole.targets import target_modules
from fedamole.training import ScoredModel

NOWHERE = Path("nowhere")
PAPER = Path(__file__).parents[2] / "configs" / "paper"
SMALL = BackboneSize(
    hidden_size=256,
    num_hidden_layers=3,
    intermediate_size=640,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=500,
)
# The same model in the words of other families.
PLAIN = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 500}
GATED = {**PLAIN, "intermediate_size": 640, "num_key_value_heads": 2}
ALIBI = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}


def study(configs: Path, name: str = "demo", **changes: Any) -> Config:
    """One of the project's configs, with changes."""
    raw = {**read_yaml(configs / f"{name}.yaml"), **changes}
    return load_config(raw, configs)


def llama(size: BackboneSize) -> LlamaForCausalLM:
    """The model with these sizes; without memory under ``torch.device("meta")``."""
    sizes = size.model_dump(exclude_none=True, exclude={"family"})
    return LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)


def layers_of(model: LlamaForCausalLM) -> list[tuple[str, int, int]]:
    """Linear layers of a model but its output layer."""
    return [
        (name, layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    ]


# The model


def test_an_output_layer_of_its_own_counts() -> None:
    untied = SMALL.model_copy(update={"tie_word_embeddings": False})
    more = of_dimensions(untied, "").num_parameters - of_dimensions(SMALL, "").num_parameters
    assert more == 500 * 256


def record_of(model: LlamaForCausalLM) -> dict[str, Any]:
    """What backbone.json says of a model."""
    keys = ("name", "in_features", "out_features")
    return {
        "modules": [dict(zip(keys, layer, strict=True)) for layer in layers_of(model)],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "default_targets": ["q_proj", "v_proj"],
        "model_type": "llama",
    }


def test_the_best_source_of_the_size_counts(tmp_path: Path) -> None:
    model = llama(SMALL)
    model.config.save_pretrained(tmp_path / "folder")
    prepared = tmp_path / "prepared"
    model.config.save_pretrained(prepared)

    def found(**settings: Any) -> ModelSize | None:
        return model_size(BackboneSettings(name="m", **settings), prepared)

    assert found(hub="somebody/something") is None
    wrong = SMALL.model_copy(update={"hidden_size": 64})
    by_hand = found(hub="somebody/something", size=wrong)
    assert by_hand
    assert by_hand.source == "backbone: size"
    of_folder = found(folder=str(tmp_path / "folder"), size=wrong)
    assert of_folder
    assert of_folder.num_parameters == sum(p.numel() for p in model.parameters())
    generated = found(generate={"hidden_size": 64})
    assert generated
    assert generated.hidden_size == 64
    write_record(prepared / "backbone.json", Header("backbone", "0" * 64), record_of(model))
    exact = found(hub="somebody/something", size=wrong)
    assert exact
    assert exact.exact
    assert exact.num_parameters == of_folder.num_parameters
    assert exact.vocab_size == 500
    assert exact.key_value_width == 2 * 2 * 32
    (prepared / "backbone.json").write_text("{")
    assert found(hub="somebody/something", size=wrong) == by_hand


def test_a_generated_model_has_the_size_of_its_settings(configs: Path) -> None:
    config = study(configs, "smoke")
    model = config.backbone.generate
    assert model
    size = model_size(config.backbone, NOWHERE)
    assert size
    dimensions = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    real = LlamaConfig(vocab_size=384, num_attention_heads=4, num_key_value_heads=4, **dimensions)
    assert size.num_parameters == sum(p.numel() for p in LlamaForCausalLM(real).parameters())


@pytest.mark.parametrize("targets", [None, ["down_proj"], ["0.self_attn.k_proj", "o_proj"]])
def test_the_adapted_layers_are_those_that_the_run_adapts(targets: list[str] | None) -> None:
    record = record_of(llama(SMALL))
    expected = [(m.name, m.in_features, m.out_features) for m in target_modules(record, targets)]
    assert [tuple(layer) for layer in of_dimensions(SMALL, "").adapted(targets)] == expected


# The work


@pytest.mark.parametrize("products", [2, 4])
def test_operations_are_those_that_torch_counts(products: int) -> None:
    model, ids = llama(SMALL), torch.zeros((2, 16), dtype=torch.long)
    inputs = model.get_input_embeddings()(ids).requires_grad_(products == 4)
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=inputs, logits_to_keep=4).logits
        if products == 4:
            logits.sum().backward()
    passes = Passes(number=1, tokens=32, logits=8, products=products)
    # Attention scores are left out.
    assert counter.get_total_flops() == pytest.approx(passes.flops(of_dimensions(SMALL, "")), 0.05)


DEMO = "chatterbot-dir0.5-s42"


@pytest.mark.parametrize(
    ("training", "steps", "pooled"),
    [
        ({"steps": 7}, 7, 28),
        ({}, 200, 800),
        # 2000 examples are assumed, and 16 of the embedding set, which FedIT trains on too.
        ({"local_epochs": 3, "batch_size": 5}, math.ceil(3 * 2016 / 5), math.ceil(12 * 2016 / 5)),
    ],
)
def test_pooled_data_take_the_steps_of_all_clients(
    training: dict[str, int], steps: int, pooled: int, configs: Path
) -> None:
    config = study(configs, training=training, methods=["fedit", "centralised"])
    data = assumed_data(config.scenarios[0])
    apart, together = works_of(config)
    assert steps_of(config, DEMO, apart, data) == [steps] * 4
    assert steps_of(config, DEMO, together, data) == [pooled]


def test_steps_of_unequal_devices_are_those_that_clients_take(configs: Path) -> None:
    config = study(
        configs, training={"steps": 60, "min_steps": 3}, methods=["fedit", "centralised"]
    )
    data = assumed_data(config.scenarios[0])
    apart, together = works_of(config)
    stage = stages.run_stage(config, DEMO, "fedit")
    own = [stage.steps_of(client, num_examples=500) for client in range(4)]
    assert len(set(own)) > 1
    assert steps_of(config, DEMO, apart, data) == own
    assert steps_of(config, DEMO, together, data) == [sum(own)]


def test_the_embedding_set_is_trained_on_held_back_or_searched(configs: Path) -> None:
    methods = ["fedamole", "fedit", "fedapen", "fdlora"]
    config = study(configs, methods=methods, evaluation={"batch_size": 4, "max_new_tokens": 20})
    data = assumed_data(config.scenarios[0])
    works = {work.run: work for work in works_of(config)}
    assert {run: examples_of(data, works[run]) for run in methods} == {
        **dict.fromkeys(methods, 2000),
        "fedit": 2016,
    }
    sequences = {
        run: sum(part.tokens for part in embedding_passes(config, data, works[run])) / data.tokens
        for run in methods
    }
    # FDLoRA tries five pairs of weights on five batches, of which the 16 examples give four.
    assert sequences == {"fedamole": 16, "fedit": 0, "fedapen": 16, "fdlora": 5 * 16}
    alone = study(configs, methods=methods, training={"batch_size": 1})
    (passes, *_) = embedding_passes(alone, data, works["fdlora"])
    assert passes.tokens == pytest.approx(5 * data.tokens)


@pytest.mark.parametrize(("size", "expected"), [("all", [7]), (1, [1] * 7), (3, [3, 3, 1])])
def test_clients_are_cut_into_jobs(size: Any, expected: list[int], configs: Path) -> None:
    config = study(configs, execution={"clients_per_job": size})
    cut = shards(config, range(10, 17))
    assert [len(clients) for clients in cut] == expected
    assert [client for clients in cut for client in clients] == list(range(10, 17))


@pytest.mark.parametrize(
    ("methods", "size", "expected"),
    [
        (["fedit-ft"], "all", {False: 2}),
        (["fedit"], "all", {False: 4}),
        (["fedit", "centralised"], 3, {False: 3, True: 4}),
        (["fedit-ft"], 1, {False: 1}),
        (["zero-shot"], "all", {False: 4}),
    ],
)
def test_the_largest_job_is_one_that_there_is(
    methods: list[str], size: Any, expected: dict[bool, int], configs: Path
) -> None:
    # Of four clients two take part, but averages are tested on all.
    config = study(
        configs,
        methods=methods,
        participation={"fraction": 0.4},
        execution={"clients_per_job": size},
        tables={"reference": methods[0]},
    )
    assert largest_jobs(config, config.scenarios[0]) == expected


# Memory


@pytest.fixture
def plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what ZeRO-3 has patched for good, if another test of this process used it.

    Its linear function keeps its input, also where the weight is frozen.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def saved_bytes(backbone: PreTrainedModel, experts: int, tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass of a frozen model with adapters."""
    adapters = HMoLEConfig(r=8, num_experts=experts, top_k=2)
    model = ScoredModel(get_peft_model(backbone, adapters), 0.001).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collate([np.arange(tokens) % 500], [tokens - 1], 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(batch)
    assert outputs
    return sum(
        tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights
    )


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(dtype: str, configs: Path) -> None:
    experts = 5
    config = study(configs, assignment={"num_experts": 8, "choices": 2, "max_experts": experts})
    config = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"dtype": dtype})}
    )
    real = [
        saved_bytes(llama(SMALL).to(getattr(torch, dtype)), experts, tokens) for tokens in (64, 192)
    ]
    # The difference leaves out what does not grow with the tokens.
    per_token = (real[1] - real[0]) / 128
    expected = activation_bytes(pass_of(config), of_dimensions(SMALL, ""))
    assert expected == pytest.approx(per_token, 0.03)


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize(
    ("real", "attention", "family"),
    [
        (LlamaConfig(**GATED), "eager", "llama"),
        (Gemma2Config(**GATED, head_dim=32), "eager", "llama"),
        (OPTConfig(**PLAIN, ffn_dim=640, do_layer_norm_before=False), "sdpa", "opt"),
        (FalconConfig(**PLAIN, **ALIBI, ffn_hidden_size=640), "sdpa", "falcon"),
    ],
    ids=["llama-eager", "gemma2", "opt", "falcon"],
)
def test_activations_of_other_models_are_about_what_autograd_keeps(
    real: PreTrainedConfig, attention: Any, family: Any, configs: Path
) -> None:
    experts, tokens = 5, 256
    scenario = {**read_yaml(configs / "demo.yaml")["scenarios"][0], "max_length": tokens}
    assignment = {"num_experts": 8, "choices": 2, "max_experts": experts}
    config = study(configs, assignment=assignment, scenarios=[scenario])
    changes = {"dtype": "bfloat16", "attention": attention}
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update=changes)})
    model = AutoModelForCausalLM.from_config(real, attn_implementation=attention)
    kept = saved_bytes(model.to(torch.bfloat16).requires_grad_(False), experts, tokens)
    heads = {} if family == "llama" else {"num_key_value_heads": None}
    size = of_dimensions(SMALL.model_copy(update={"family": family, **heads}), "")
    assert tokens * activation_bytes(pass_of(config), size) == pytest.approx(kept, rel=0.2)


def size_of(config: Config) -> ModelSize:
    size = model_size(config.backbone, NOWHERE)
    assert size
    return size


def test_memory_covers_what_jobs_took_and_is_not_silly(configs: Path) -> None:
    # Measured in finished jobs: up to 1.85 GB for the demo, 2.4 GB with sequences of 128 tokens.
    demo = study(configs)
    assert 1850 < job_memory_mb(demo, size_of(demo)) < 2 * 1850
    longer = [{**read_yaml(configs / "demo.yaml")["scenarios"][0], "max_length": 128}]
    config = study(configs, scenarios=longer)
    assert 2400 < job_memory_mb(config, size_of(config)) < 2 * 2400
    # 0.52 GB.
    smoke = study(configs, "smoke")
    assert job_memory_mb(smoke, size_of(smoke)) == 2000
    assert job_memory_mb(demo, None) == 8000


def test_memory_is_that_of_the_processes_of_a_node(configs: Path) -> None:
    one, four, spread = (
        study(configs, execution={"clients_at_once": lanes, "nodes": nodes, "gpus": gpus})
        for lanes, nodes, gpus in ((1, 1, 0), (4, 1, 0), (4, 4, 0))
    )
    assert job_memory_mb(four, size_of(four)) == pytest.approx(
        4 * job_memory_mb(one, size_of(one)), rel=0.05
    )
    assert job_memory_mb(spread, size_of(spread)) == job_memory_mb(one, size_of(one))


def paper(configs: Path, **changes: Any) -> Config:
    """Llama-3.2-1B on Dolly; four GPUs to a client."""
    training = {"steps": 200, "batch_size": 4, "ranks": 4}
    settings: dict[str, Any] = {
        "backbone": "llama-3.2-1b",
        "scenarios": [{"dataset": "dolly", "partition": "dir1.0"}],
        "methods": ["fedamole"],
        "training": training,
        "execution": {"gpus": 4},
    }
    return load_config({**settings, **changes}, configs)


def test_zero_cuts_what_it_says(configs: Path) -> None:
    config = paper(configs)
    size = size_of(config)
    zero = [gpu_memory(config, size, ZeRO(stage), checkpointing=False) for stage in range(4)]
    host = gpu_memory(config, size, ZeRO(3, offload=True), checkpointing=False)
    # Weights in bfloat16, whole but at stage 3; there a quarter, and what is gathered.
    assert zero[0].weights == zero[1].weights == zero[2].weights == 2 * size.num_parameters
    assert zero[3].weights - host.weights == 2 * size.num_parameters / 4
    assert zero[3].weights < zero[2].weights
    # Adapters: weights, gradients and two moments in float32 at stage 0.
    held = 9 * 851_968 + 524_288
    assert zero[0].adapters == 4 * 4 * held
    assert zero[3].adapters < zero[2].adapters < zero[1].adapters < zero[0].adapters
    checkpointed = gpu_memory(config, size, ZeRO(1), checkpointing=True)
    assert checkpointed.training < zero[1].training / 1.5
    assert checkpointed.testing == zero[1].testing


# Time


def test_minutes_are_generous_and_grow_with_the_work(configs: Path) -> None:
    demo = study(configs)
    # A job of the demo took three and a half minutes.
    assert job_minutes(demo, size_of(demo), demo.scenarios[0], 4) == 30
    assert job_minutes(demo, None, demo.scenarios[0], 4) == 240
    long = study(configs, training={"steps": 2000, "batch_size": 4})
    size = size_of(long)
    one, four = (job_minutes(long, size, long.scenarios[0], clients) for clients in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)
    lanes = study(
        configs,
        training={"steps": 2000, "batch_size": 4},
        execution={"clients_at_once": 2},
    )
    assert job_minutes(lanes, size, lanes.scenarios[0], 4) == pytest.approx(2 * one, rel=0.05)


def test_minutes_of_pooled_data_are_those_of_one_client_with_all_steps(configs: Path) -> None:
    training = {"steps": 2000, "batch_size": 4}
    methods = ["fedit", "centralised"]
    alone, at_once = (
        study(configs, training=training, methods=methods, execution={"clients_at_once": lanes})
        for lanes in (1, 4)
    )
    size, scenario = size_of(alone), alone.scenarios[0]
    pooled = job_minutes(alone, size, scenario, 4, pooled=True)
    assert pooled == pytest.approx(job_minutes(alone, size, scenario, 4), rel=0.1)
    # Lanes work on different clients.
    assert job_minutes(at_once, size, scenario, 4, pooled=True) == pooled
    assert job_minutes(at_once, size, scenario, 4) < 0.3 * pooled


def clock_of(config: Config) -> Clock:
    """A clock of computed times, without the start of jobs."""
    machine = replace(assumed_machine(config), start_s=0.0)
    return Clock(config, size_of(config), machine)


def run_time(config: Config, work: RunWork) -> tuple[float, float]:
    """Seconds of all jobs of a run, and operations."""
    times = clock_of(config).run(DEMO, assumed_data(config.scenarios[0]), work)
    return times.seconds, times.flops


def test_time_is_that_of_the_clients_that_take_part(configs: Path) -> None:
    changes: dict[str, Any] = {"rounds": 40, "execution": {"clients_per_job": 1}}
    sampling = {"fraction": 0.75, "dropout_rate": 0.2, "quorum": 0.3}
    whole = study(configs, methods=["fedit-ft"], tables={"reference": "fedit-ft"}, **changes)
    sampled = whole.model_copy(update={"participation": ParticipationSettings(**sampling)})
    (work,) = works_of(whole)
    who = stages.run_stage(sampled, DEMO, "fedit").population
    share = sum(len(who.reporting(round_)) for round_ in range(1, 41)) / (40 * 4)
    assert 0.3 < share < 0.75
    for all_of_it, part in zip(run_time(whole, work), run_time(sampled, work), strict=True):
        assert part == pytest.approx(share * all_of_it)


def test_the_slowest_device_holds_up_a_round(configs: Path) -> None:
    training, execution = {"steps": 400, "min_steps": 10}, {"clients_per_job": 1}
    methods = ["fedit-ft"]
    config = study(configs, training=training, execution=execution, methods=methods)
    data, (work,) = assumed_data(config.scenarios[0]), works_of(config)
    clock, steps = clock_of(config), steps_of(config, DEMO, work, data)
    each = [clock.job(data, work, "train_clients", [number]) for number in steps]
    times = clock.run(DEMO, data, work)
    assert times.seconds == pytest.approx(config.rounds * sum(each))
    assert config.rounds * max(each) < times.chain_s < config.rounds * max(each) + 100


def test_two_models_side_by_side_cost_twice_the_operations(configs: Path) -> None:
    config = study(configs, methods=["fml", "local"])
    (_, mutual), (_, alone) = (run_time(config, work) for work in works_of(config))
    assert mutual == pytest.approx(2 * alone)


def test_under_dp_sgd_every_example_has_apass_of_its_own(configs: Path) -> None:
    training = {"steps": 5, "batch_size": 4}
    dp_sgd = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    plain, private = (
        study(configs, training=training, privacy=privacy) for privacy in ({}, {"dp_sgd": dp_sgd})
    )
    data, size = assumed_data(plain.scenarios[0]), size_of(plain)
    passes = [training_passes(config, data, 5) for config in (plain, private)]
    assert [part.number for part in passes] == [5, 20]
    assert passes[0].flops(size) == passes[1].flops(size)
    kept = [training_bytes(config, size, checkpointing=False) for config in (plain, private)]
    assert kept[0] == 4 * kept[1]


def test_memory_grows_with_what_stands_beside_or_before_a_sequence(configs: Path) -> None:
    def training(method: str, **changes: Any) -> float:
        config = paper(configs, methods=[method], tables={"reference": method}, **changes)
        return gpu_memory(config, size_of(config), ZeRO(1), checkpointing=False).training

    assert training("fml") == 2 * training("fedit")
    longer = training("fedptuning", prompt={"virtual_tokens": 512})
    # 1024 tokens and 512 more; the answers, and so the logits, stay.
    assert 1.2 < longer / training("fedit") < 1.5


def test_the_demo_is_computed_as_slow_as_it_was(configs: Path) -> None:
    demo = study(configs)
    size, data = size_of(demo), assumed_data(demo.scenarios[0])
    clock = Clock(demo, size, assumed_machine(demo))
    fedamole = works_of(demo)[0]
    # On busy cores 180 to 200 s, on idle ones half of that.
    assert 90 < clock.job(data, fedamole, "train_clients", [8] * 4) < 400


def test_weights_on_the_host_cost_their_way_to_the_gpu(configs: Path) -> None:
    zero3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    plain, offloaded = (
        paper(configs, training={"steps": 200, "deepspeed": deepspeed}, execution={"gpus": 1})
        for deepspeed in ("zero1", zero3)
    )
    times = [
        Clock(config, size_of(config), assumed_machine(config)).job(
            assumed_data(config.scenarios[0]), works_of(config)[0], "train_clients", [200]
        )
        for config in (plain, offloaded)
    ]
    passes = 2 * 200 + 7 * 128
    assert times[1] - times[0] > passes * 2 * size_of(plain).num_parameters / 10e9


def test_measured_times_count_before_computed_ones(configs: Path) -> None:
    demo = study(configs, execution={"clients_per_job": 3})
    slug, work = "chatterbot-dir0.5-s42", works_of(demo)[0]
    measured = {(slug, "fedamole", "train_clients"): 100.0}
    clock = Clock(demo, size_of(demo), assumed_machine(demo), measured)
    times = clock.run(slug, assumed_data(demo.scenarios[0]), work)
    assert times.seconds == demo.rounds * 400
    # Aggregate and assign between rounds take a moment.
    assert 900 < times.chain_s < 1000
    assert times.chain_jobs == 3


def test_the_plan_says_who_takes_part_if_that_is_not_everyone(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(**changes: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**read_yaml(configs / "smoke.yaml"), **changes}))
        assert main(["plan", "--configfile", str(path)]) == 0
        return capsys.readouterr().out

    assert "Participation" not in printed()
    assert "At most" not in printed()
    ten = {**read_yaml(configs / "smoke.yaml")["scenarios"][0], "clients": 10}
    text = printed(
        methods=["fedit", "centralised", "fedprompt"],
        scenarios=[ten],
        participation={"fraction": 0.6, "dropout_rate": 0.25, "quorum": 0.5},
        training={"steps": 9, "min_steps": 4},
        prompt={"text": "Answer:"},
    )
    assert (
        "Participation\n"
        "chatterbot-dir0.5: 6 of 10 clients a round, at least 3 must report; each drops out with "
        "probability 0.25\n"
        "Every client takes its own number of steps, from 4 to 9.\n"
        "centralised: one client, which trains on the data of all.\n"
    ) in text
    # Seven bytes, and what a tokenizer may set before them.
    assert "At most: the prompt of fedprompt has 9 tokens" in text
    drawn = printed(scenarios=[ten], methods=["fedit-ft"], participation={"fraction": 0.2})
    assert "2 of 10 clients a round, all of them must report\n" in drawn


SWEEPS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("training.steps", [2, 200_000], {"training": {"batch_size": 4}}),
    ("scenarios.clients", [3, 4], {}),
    ("participation.fraction", [0.5, 1.0], {}),
    ("assignment.num_experts", [6, 9], {}),
]


def swept(configs: Path, key: str, values: list[Any], **changes: Any) -> list[dict[str, Any]]:
    """The smoke config under a sweep, and under each of its values by itself."""
    raw = {**read_yaml(configs / "smoke.yaml"), "methods": ["fedamole", "fedit"], **changes}
    section, _, name = key.partition(".")
    alone = []
    for value in values:
        if section == "scenarios":
            part: Any = [{**raw["scenarios"][0], name: value}]
        else:
            part = {**raw.get(section, {}), name: value}
        alone.append({**raw, section: part})
    return [{**raw, "sweep": {key: values}}, *alone]


@pytest.mark.parametrize(("key", "values", "changes"), SWEEPS)
def test_the_plan_of_a_sweep_is_those_of_its_points_together(
    key: str,
    values: list[Any],
    changes: dict[str, Any],
    configs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows(raw: dict[str, Any]) -> tuple[list[list[str]], list[float]]:
        """All lines of scenarios without their names; hours, then gibibytes of all runs."""
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**raw, "results": str(tmp_path / "results")}))
        assert main(["plan", "--configfile", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        cells = [line.split()[1:] for line in lines if line.startswith("chatterbot-")]
        together = [line.split() for line in lines if line.startswith("Together")]
        return cells, [float(together[0][1]), float(together[1][-4].removesuffix(","))]

    whole, *alone = map(rows, swept(configs, key, values, **changes))
    # Two runs with their times, a job, two runs with their files, and who takes part if not all.
    assert len(whole[0]) == 2 * 5 + (key == "participation.fraction")
    assert sorted(whole[0]) == sorted([*alone[0][0], *alone[1][0]])
    assert alone[0] != alone[1]
    sums = [sum(numbers) for numbers in zip(*(total for _, total in alone), strict=True)]
    assert whole[1] == pytest.approx(sums, abs=0.011)


@pytest.mark.parametrize(("key", "values", "changes"), SWEEPS)
def test_the_jobs_of_a_sweep_are_those_of_its_points_but_for_what_they_share(
    key: str, values: list[Any], changes: dict[str, Any], configs: Path
) -> None:
    loaded = [load_config(raw, configs) for raw in swept(configs, key, values, **changes)]
    whole, one, other = map(job_counts, loaded)
    once = {"prepare_backbone", "write_manifest", "describe_study", "draw_tables", "draw_figures"}
    if not key.startswith("scenarios."):
        once |= {"partition", "tokenize"}
    assert whole == {
        rule: number if rule in once else number + other[rule] for rule, number in one.items()
    }


def test_the_memory_of_a_sweep_is_that_of_its_largest_point(configs: Path) -> None:
    scenarios = [
        {"dataset": "chatterbot", "partition": "iid", "max_length": length, "clients": 3}
        for length in (512, 64)
    ]
    named = [{**each, "name": str(each["max_length"])} for each in scenarios]
    sweep, *alone = (
        load_config(raw, configs)
        for raw in swept(configs, "training.batch_size", [4, 4096], scenarios=named)
    )
    needed = [job_memory_mb(config, size_of(config)) for config in alone]
    # Of the first scenario, too.
    assert job_memory_mb(sweep, size_of(sweep)) == max(needed) > min(needed)


@pytest.mark.parametrize("key", ["training.learning_rate", "scenarios.max_length"])
def test_a_point_of_a_sweep_knows_the_tokens_of_its_population(
    key: str, configs: Path, tmp_path: Path
) -> None:
    values = [0.01, 0.02] if key.startswith("training") else [32, 64]
    raw = swept(configs, key, values, results=str(tmp_path))[0]
    known = read_study(load_config(raw, configs))
    assert [*known.data] == [*known.config.data_seeds()]
    trial = _Trial(known.config, tmp_path)
    assert trial.slug == next(iter(known.data))
    assert stages.client_stage(trial.config, trial.slug, "fedamole").run.label.endswith("fedamole")


def test_measured_times_of_a_point_count_for_it_alone(configs: Path) -> None:
    raw = swept(configs, "training.learning_rate", [0.01, 0.02], methods=["fedamole"])[0]
    known = read_study(load_config(raw, configs))
    slow = f"{DEMO.removesuffix('-s42')}-learning_rate0.02-s42"
    size = size_of(known.config)
    measured = {(slow, "fedamole", "train_clients"): 1000.0}
    clock = Clock(known.config, size, assumed_machine(known.config), measured)
    costs = list(_costs(known, clock))
    assert [cost.measured for cost in costs] == [False, True]
    assert costs[1].times[0].seconds > 1000 > 10 * costs[0].times[0].seconds


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPER.glob("*.yaml")))
def test_every_study_of_the_paper_has_a_plan(
    name: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = read_yaml(configs / "paper" / f"{name}.yaml")
    if "numbers" in raw:
        pytest.skip("numbers that were published, not a study")
    config = load_config(raw, configs, name, [configs / "paper"])
    path = tmp_path / f"{name}.yaml"
    path.write_text(json.dumps({**raw, "results": str(tmp_path / "results")}))
    (tmp_path / "base.yaml").write_text((configs / "paper" / "base.yaml").read_text())
    assert main(["plan", "--configfile", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # A row for every run, and one for what jobs ask for.
    for column in config.points:
        found = [line for line in lines if line.startswith(f"{column} ")]
        assert len(found) > len(config.runs())


def test_a_measured_job_had_those_of_its_clients_that_took_part(
    configs: Path, tmp_path: Path
) -> None:
    config = study(
        configs,
        results=str(tmp_path),
        rounds=4,
        methods=["fedit-ft", "centralised"],
        participation={"fraction": 0.5},
        scenarios=[{"dataset": "chatterbot", "partition": "dir0.5", "clients": 10}],
    )
    for run in ("fedit", "centralised"):
        digest = stages.digest(client := stages.client_stage(config, DEMO, run))
        for round_, seconds in ((1, 50.0), (3, 100.0)):
            drawn = client.run.population.reporting(round_)
            first, last = f"_{drawn[0]:03d}", f"_{drawn[-1]:03d}" if drawn[1:] else ""
            folder = f"{DEMO}/{run}/round_{round_:03d}"
            metrics = tmp_path / "runs" / folder / f"metrics{first}.json"
            write_record(metrics, Header("metrics", digest), {})
            benchmark = tmp_path / "benchmarks" / folder / f"train_clients{first}{last}.tsv"
            benchmark.parent.mkdir(parents=True)
            benchmark.write_text(f"s\th:m:s\n{seconds}\t0:00:30\n")
    # Five of ten clients took 50 s and 100 s one after another; where data are pooled one did.
    assert read_benchmarks(config) == {
        (DEMO, "fedit", "train_clients"): 15.0,
        (DEMO, "centralised", "train_clients"): 75.0,
    }


def test_the_snakefile_waits_for_no_library() -> None:
    code = "import sys, fedamole.planning.times; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "numpy", "h5py", "transformers", "ortools", "matplotlib"}
    assert not heavy & set(json.loads(done.stdout))
