"""Whole runs of a miniature: what learns, what is written, and that nothing but the recipe decides the result."""

import json
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from full_disk import fill_disk
from miniature import losses_of, tiny_recipe, write_data, write_tiny_model
from PIL import Image
from run_recipe import run_in_processes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.integrations.deepspeed import set_hf_deepspeed_config

from mgllava.training.errors import CheckpointError, DataError, RecipeError
from mgllava.training.neck import is_neck, load_neck
from mgllava.training.recipe import recipe_from_dict
from mgllava.training.result import write_model
from mgllava.training.run import _unsharded, build_trainer, train
from mgllava.training.trainer import MGLlavaTrainer
from mgllava_kernels import use_backend

STEPS = 6
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of one order, as in the processes of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(model_folder, data, tmp_path_factory):
    """A run of stage 2, with two epochs and a learning rate that falls."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(run_recipe(model_folder, data, output))
    return output


def run_recipe(model_folder, data, output, **changes):
    settings = {"max_steps": STEPS, "schedule": "cosine", "warmup_share": 0.2, **changes}
    return tiny_recipe(model_folder, data, output, **settings)


class Gradients(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_weights(one, other, tolerance=0.0):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name in one:
        difference = (one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)
        assert difference <= tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_the_fast_path_learns_what_the_reference_learns(model_folder, data, tmp_path, stage):
    """20 steps in float32: losses, and the gradients of the first step, agree."""
    losses, gradients = {}, {}
    for backend in ("torch", "reference"):
        recipe = run_recipe(model_folder, data, tmp_path / backend, stage=stage, max_steps=20, save_every=20)
        trainer = build_trainer(recipe)
        seen = Gradients()
        trainer.add_callback(seen)
        with use_backend(backend):
            trainer.train()
        losses[backend], gradients[backend] = losses_of(tmp_path / backend), seen.first
    assert len(losses["torch"]) == 20
    assert losses["torch"] == pytest.approx(losses["reference"], rel=TOLERANCE)
    assert losses["torch"][-1] < losses["torch"][0]
    assert gradients["torch"].keys() == gradients["reference"].keys()
    for name, expected in gradients["reference"].items():
        error = (gradients["torch"][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "changes", "weights"),
    [
        ("ddp", {"stage": 1}, "neck"),
        ("ddp", {}, "model"),
        ("ddp", {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}}, "adapter_model"),
        ("fsdp2", {}, "model"),
    ],
    ids=["ddp-stage-1", "ddp-stage-2", "ddp-lora", "fsdp2-stage-2"],
)
def test_two_processes_learn_what_one_learns(model_folder, tmp_path, engine, changes, weights):
    """Among the batches: text alone in both processes, and pictures in one and text alone in the other."""
    pictures, settings = (5 if "stage" in changes else 9), changes | {"max_steps": 8}
    data = write_data(tmp_path / "data", pictured=pictures, text_only=16 - pictures)
    trainer = build_trainer(run_recipe(model_folder, data, tmp_path / "one", **settings))
    order = list(trainer.order)
    pictured = [[trainer.order.lengths[i] > 0 for i in order[first : first + 2]] for first in range(0, 16, 2)]
    batches = list(zip(pictured[::2], pictured[1::2], strict=True))
    assert ([False, False], [False, False]) in batches
    assert any(any(one) != any(other) for one, other in batches)
    trainer.train()

    recipe = run_recipe(model_folder, data, tmp_path / "two", **settings, per_device_batch=2)
    # Killed within the second epoch, as every process would be.
    killed = run_in_processes(recipe, killed_at="step 8", processes=2, sharded=engine == "fsdp2")
    assert -signal.SIGKILL in killed
    assert (tmp_path / "two" / "checkpoint-6").is_dir()
    assert not (tmp_path / "two" / "checkpoint-8").exists()
    assert run_in_processes(recipe, processes=2, sharded=engine == "fsdp2") == [0, 0]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=TOLERANCE)
    assert (tmp_path / "two" / "checkpoint-8" / "pytorch_model_fsdp.bin").is_file() == (engine == "fsdp2")
    one, two = (tmp_path / name / "checkpoint-8" / f"{weights}.safetensors" for name in ("one", "two"))
    assert_same_weights(one, two, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("damaged", "codes"), [(1, [0, 0]), (2, [1, 1])])
def test_damaged_pictures_of_all_processes_count_together(model_folder, tmp_path, damaged, codes):
    """One of 16 may be bad, and each of two processes meets one at most, or both the same in two epochs."""
    data = write_data(tmp_path / "data", pictured=16, text_only=0)
    recipe = run_recipe(
        model_folder, data, tmp_path / "run", stage=1, max_steps=8, per_device_batch=2, max_bad_share=0.1
    )
    order = list(build_trainer(recipe).order)
    for number in order[: 2 * damaged : 2]:  # the first of each process's first batch
        picture = tmp_path / "data" / "pictures" / f"{number}.png"
        picture.write_bytes(picture.read_bytes()[:-60])
    assert run_in_processes(recipe, processes=2) == codes
    if damaged == 1:
        state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
        assert {entry["records_replaced"] for entry in state["log_history"] if "loss" in entry} == {1}
    else:
        for error in (tmp_path / f"run.{rank}.error" for rank in (0, 1)):
            assert "2 of 16 records cannot be used, more than the 1 that max_bad_share" in error.read_text()
        assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_accumulated_gradients_are_those_of_the_whole_batch(model_folder, data, tmp_path, uninterrupted):
    train(run_recipe(model_folder, data, tmp_path / "a", per_device_batch=1))
    assert losses_of(tmp_path / "a") == pytest.approx(losses_of(uninterrupted), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(model_folder, data, tmp_path, uninterrupted, where):
    output = tmp_path / "killed"
    recipe = run_recipe(model_folder, data, output)
    killed_at = "save 4" if where == "save" else f"step {random.SystemRandom().randint(1, STEPS)}"
    print(killed_at)  # shown if the test fails
    assert run_in_processes(recipe, killed_at=killed_at) == [-signal.SIGKILL]
    left = sorted(path.name for path in output.glob("checkpoint-*"))
    assert "checkpoint-6" not in left
    assert killed_at != "save 4" or left == ["checkpoint-2"]
    train(recipe)
    assert losses_of(output) == losses_of(uninterrupted)
    assert_same_weights(output / "model" / "model.safetensors", uninterrupted / "model" / "model.safetensors")
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("changes", [{"stage": 1}, {"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}])
def test_stage_1_and_adapters_go_on_exactly_too(model_folder, data, tmp_path, monkeypatch, changes):
    whole = run_recipe(model_folder, data, tmp_path / "whole", max_steps=4, **changes)
    result = train(whole)
    monkeypatch.setattr(MGLlavaTrainer, "training_step", stop_at(3, MGLlavaTrainer.training_step))
    recipe = run_recipe(model_folder, data, tmp_path / "stopped", max_steps=4, **changes)
    with pytest.raises(InterruptedError):
        train(recipe)
    monkeypatch.undo()
    again = train(recipe)
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    names = ("", "") if result.is_file() else ("model.safetensors",) * 2
    assert_same_weights(result / names[0] if names[0] else result, again / names[1] if names[1] else again)


def stop_at(step, training_step):
    def stopping(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise InterruptedError
        return training_step(self, *args, **kwargs)

    return stopping


def test_a_full_disk_loses_nothing(model_folder, data, tmp_path, monkeypatch, uninterrupted):
    output = tmp_path / "full"
    recipe = run_recipe(model_folder, data, output)
    fill_disk(monkeypatch, step=4, room=100_000)
    with pytest.raises(CheckpointError, match=r"of step 4 cannot be written: .*checkpoint-2 is intact"):
        train(recipe)
    monkeypatch.undo()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(output.glob(".*"))
    train(recipe)
    assert losses_of(output) == losses_of(uninterrupted)


def test_a_disk_too_full_for_the_result_leaves_the_checkpoint(model_folder, data, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    recipe = run_recipe(model_folder, data, tmp_path / "run", max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("mgllava.training.result.MGLlavaProcessor.save_pretrained", full)
        with pytest.raises(
            CheckpointError, match=r"model cannot be written: .*No space.*checkpoint-2 is intact"
        ):
            train(recipe)
    assert not list((tmp_path / "run").glob("*model*"))
    assert (train(recipe) / "model.safetensors").is_file()


def parameters_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_converted_model_learns_exactly_what_is_published(converted_golden, golden_dir, tmp_path, stage):
    """One step at a constant learning rate."""
    files = golden_dir / "end_to_end"
    turns = [
        {"from": "human", "value": "<image>\nwhat is in the image ?"},
        {"from": "gpt", "value": "a red image"},
    ]
    records = [{"id": number, "image": "image.png", "conversations": turns} for number in range(2)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    detections = json.loads((files / "detections.json").read_text())
    (tmp_path / "boxes.json").write_text(json.dumps([{"id": str(i), **detections} for i in range(2)]))
    data = {
        "records": str(tmp_path / "records.json"),
        "pictures": str(files),
        "boxes": str(tmp_path / "boxes.json"),
    }
    changes = {"global_batch": 2, "per_device_batch": 2, "max_steps": 1, "text_limit": None}
    trainer = build_trainer(tiny_recipe(converted_golden, data, tmp_path / "run", stage=stage, **changes))
    before = parameters_of(trainer.model)
    trainer.train()
    after = parameters_of(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if is_neck(name)}
    if stage == 2:
        expected |= {name for name in before if name.startswith(("model.language_model.", "lm_head."))}
    assert len(expected) < len(before)
    assert changed == expected


def test_stage_1_leaves_a_neck_that_stage_2_begins_with(model_folder, data, tmp_path):
    neck = train(run_recipe(model_folder, data, tmp_path / "one", stage=1, max_steps=2))
    assert neck == tmp_path / "one" / "neck.safetensors"
    weights = load_file(neck)
    assert all(is_neck(name) for name in weights)
    assert not list((tmp_path / "one").rglob("model*.safetensors"))
    second = run_recipe(model_folder, data, tmp_path / "two", neck=str(neck), max_steps=2)
    trainer = build_trainer(second)
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    original = AutoModelForImageTextToText.from_pretrained(model_folder).state_dict()
    assert not torch.equal(original["model.fusion.gate_in.weight"], weights["model.fusion.gate_in.weight"])


def test_the_result_of_stage_2_loads_and_answers(uninterrupted, model_folder):
    model = AutoModelForImageTextToText.from_pretrained(uninterrupted / "model")
    processor = AutoProcessor.from_pretrained(uninterrupted / "model")
    chat = [{"role": "user", "content": [{"type": "text", "text": "How many dogs are there?"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        contents = [
            json.loads((folder / name).read_text(), object_hook=without_dtype)
            for folder in (uninterrupted / "model", model_folder)
        ]
        assert contents[0] == contents[1]


def without_dtype(values):
    return {key: value for key, value in values.items() if key != "dtype"}


def test_the_result_has_the_models_own_names(model_folder, data, tmp_path, uninterrupted):
    """Whatever the checkpoint has: transformers writes older ones under ZeRO-3."""
    result = load_file(uninterrupted / "model" / "model.safetensors")
    checkpoint = shutil.copytree(uninterrupted / "checkpoint-6", tmp_path / "checkpoint")
    older = {
        name.replace("model.vision_tower.", "model.vision_tower.vision_model."): value
        for name, value in result.items()
    }
    save_file(older, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_model(run_recipe(model_folder, data, tmp_path / "run"), checkpoint, tmp_path / "model")
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert again.keys() == result.keys() != older.keys()
    assert all(torch.equal(again[name], value) for name, value in result.items())


def test_what_one_process_builds_is_not_sharded():
    """ZeRO-3 would wait for the others at every weight."""

    class Sharded:
        def is_zero3(self):
            return True

    config = Sharded()
    plugin = SimpleNamespace(set_deepspeed_weakref=lambda: set_hf_deepspeed_config(config))
    plugin.set_deepspeed_weakref()
    try:
        with _unsharded(SimpleNamespace(deepspeed_plugin=plugin)):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()


def test_adapters_are_merged_into_the_result(model_folder, data, tmp_path):
    recipe = run_recipe(
        model_folder, data, tmp_path / "lora", lora={"rank": 2, "alpha": 4}, max_steps=2, learning_rate=0.05
    )
    trainer = build_trainer(recipe)
    learners = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in learners)
    assert all(("lora_" in name and "language_model" in name) or is_neck(name) for name in learners)
    result = train(recipe)
    merged = load_file(result / "model.safetensors")
    original = load_file(model_folder / "model.safetensors")
    assert merged.keys() == original.keys()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    projections = {name for name in merged if "language_model.layers" in name and "_proj.weight" in name}
    assert projections <= changed
    assert all(is_neck(name) or name in projections for name in changed)
    neck = load_file(tmp_path / "lora" / "checkpoint-2" / "neck.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in neck.items())


def test_bfloat16_keeps_what_learns_in_float32(model_folder, data, tmp_path):
    recipe = run_recipe(
        model_folder,
        data,
        tmp_path / "a",
        precision="bfloat16",
        gradient_checkpointing=True,
        max_steps=2,
        stage=1,
    )
    trainer = build_trainer(recipe)
    dtypes = {is_neck(name): p.dtype for name, p in trainer.model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    trainer.train()
    tower = trainer.model.model.vision_tower
    assert not any(module.training for module in tower.modules())
    assert losses_of(tmp_path / "a")[1] == pytest.approx(losses_of(tmp_path / "a")[0], rel=0.2)


def test_gradient_checkpointing_changes_nothing(model_folder, data, tmp_path, uninterrupted):
    train(run_recipe(model_folder, data, tmp_path / "a", gradient_checkpointing=True))
    assert losses_of(tmp_path / "a") == pytest.approx(losses_of(uninterrupted), rel=1e-6)


def test_the_log_tells_throughput_and_memory(uninterrupted):
    state = json.loads((uninterrupted / "checkpoint-6" / "trainer_state.json").read_text())
    first = state["log_history"][0]
    assert first["samples_per_second"] > 0
    assert 0.01 < first["memory_gib"] < 1000
    assert first["num_input_tokens_seen"] > 0
    assert first["records_replaced"] == 0


def test_so_many_checkpoints_stay_as_the_recipe_says(uninterrupted, model_folder, data, tmp_path):
    assert sorted(path.name for path in uninterrupted.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_run_goes_on_with_other_intervals(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(MGLlavaTrainer, "training_step", stop_at(3, MGLlavaTrainer.training_step))
    with pytest.raises(InterruptedError):
        train(run_recipe(model_folder, data, tmp_path / "run", keep_checkpoints=9))
    monkeypatch.undo()
    train(run_recipe(model_folder, data, tmp_path / "run", keep_checkpoints=9, save_every=1))
    found = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert found == {f"checkpoint-{step}" for step in range(2, STEPS + 1)}


def test_another_recipe_does_not_go_on_with_a_run(model_folder, data, uninterrupted, tmp_path):
    with pytest.raises(RecipeError, match="holds a run with learning_rate: 0.001, the recipe says 0.01"):
        train(run_recipe(model_folder, data, uninterrupted, learning_rate=0.01))
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(RecipeError, match="holds checkpoints of something else"):
        train(run_recipe(model_folder, data, tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="which is a file; expected a folder"):
        train(run_recipe(model_folder, data, tmp_path / "file"))


def test_what_is_wrong_shows_before_the_weights_load(model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("mgllava.training.run._load_model", lambda *args: pytest.fail("weights were loaded"))
    output = tmp_path / "run"
    with pytest.raises(
        RecipeError, match="global_batch is 4, which 1 processes with per_device_batch: 3 cannot"
    ):
        train(run_recipe(model_folder, data, output, per_device_batch=3))
    with pytest.raises(DataError, match="there is no file"):
        train(run_recipe(model_folder, {**data, "records": "nowhere.json"}, output))
    with pytest.raises(DataError, match="(?s)12 of 16 records cannot be used.*its picture does not exist"):
        train(run_recipe(model_folder, {**data, "pictures": str(tmp_path)}, output))
    with pytest.raises(
        RecipeError, match=r"neck is nowhere.safetensors, which does not exist; stage 1 writes"
    ):
        train(run_recipe(model_folder, data, output, neck="nowhere.safetensors"))
    with pytest.raises(RecipeError, match=r"report_to is \['abacus'\]; abacus cannot be used"):
        train(run_recipe(model_folder, data, output, report_to=["abacus"]))
    with pytest.raises(ValueError, match="no model folder at"):
        train(run_recipe(tmp_path / "nowhere", data, output))
    with pytest.raises(RecipeError, match="cannot be imported"):
        train(run_recipe(model_folder, {"dataset": "mgllava.nowhere:Scenes"}, output))
    with pytest.raises(RecipeError, match="refuses {'size': 3}"):
        train(run_recipe(model_folder, {"dataset": "builtins:list", "arguments": {"size": 3}}, output))


class Shapes:
    """A map-style dataset of pictures made by code."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {
            "image": Image.new("RGB", (40, 30), (9 * index, 0, 90)),
            "detections": {"boxes": [[1, 2, 20, 20]]},
            "turns": [("What is in the picture?", f"There are {index} dogs.")],
        }


def test_pictures_made_by_code_are_trained_on(model_folder, tmp_path):
    source = {"dataset": f"{__name__}:Shapes", "arguments": {"count": 10}}
    train(run_recipe(model_folder, source, tmp_path / "run", max_steps=2, stage=1))
    assert len(losses_of(tmp_path / "run")) == 2


def test_boxes_keep_their_pixels_under_deepspeed(model_folder, data, tmp_path):
    """Its Trainer casts floating-point inputs to the engine's dtype."""
    trainer = build_trainer(run_recipe(model_folder, data, tmp_path))
    batch = next(batch for batch in trainer.get_train_dataloader() if "boxes" in batch)
    boxes = batch["boxes"].clone()
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.is_deepspeed_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(prepared["boxes"], boxes)
    assert not boxes.is_floating_point()


def test_a_neck_of_another_model_is_refused(model_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    with pytest.raises(CheckpointError, match="there is no neck at"):
        load_neck(model, tmp_path / "neck.safetensors")
    (tmp_path / "neck.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_neck(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"is another model's: missing \[\], not expected \['lm_head"):
        load_neck(model, model_folder / "model.safetensors")


def test_recipes_survive_their_file(model_folder, data, uninterrupted):
    kept = recipe_from_dict(json.loads((uninterrupted / "recipe.json").read_text()))
    assert kept == run_recipe(model_folder, data, uninterrupted)
