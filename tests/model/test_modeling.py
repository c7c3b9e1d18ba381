"""The model class: splicing, batches, dtypes, training switches, saving and loading."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from tiny import (
    HIGH_RES,
    IMAGE,
    OBJECT,
    TEXT_VOCAB,
    one_row,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_text_config,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
)

from mgllava import MGLlavaConfig, MGLlavaForConditionalGeneration, MGLlavaModel
from mgllava.cache_name import CACHE_NAME
from mgllava.language_model_head import language_model_head
from mgllava.modeling_mgllava import MGLlavaImageFeatures
from mgllava_kernels import use_backend

ROWS = [[2], [], [1, 3], [0]]
PICTURES_OF_ROW = [slice(0, 1), slice(1, 1), slice(1, 3), slice(3, 4)]


@pytest.fixture(scope="module")
def model() -> MGLlavaForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def pixel_inputs() -> dict[str, torch.Tensor]:
    inputs = tiny_inputs([[2], [3]])
    return {k: inputs[k] for k in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")}


def test_splice_matches_the_original(golden_dir):
    golden = load_file(golden_dir / "splice.safetensors")
    objects = [golden[f"object_tokens{i}"] for i in range(3)]
    config = tiny_config(
        tiny_text_config(vocab_size=52, hidden_size=12, num_attention_heads=2),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=42,
            patch_size=14,
        ),
        high_res_config={"architecture": "test_convnext", "image_size": 96, "stage_widths": [24, 32, 48, 64]},
        text_vocab_size=50,
        image_token_id=50,
        object_token_id=51,
    )
    model = MGLlavaModel(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:50] = golden["embedding"]
    longest = max(map(len, objects))
    features = MGLlavaImageFeatures(
        pooler_output=[
            torch.cat([image, nn.functional.pad(rows, (0, 0, 0, longest - len(rows)))])
            for image, rows in zip(golden["image_tokens"], objects, strict=True)
        ],
        num_objects=torch.tensor([len(rows) for rows in objects]),
    )
    expanded, labels = [], []
    for row in range(3):
        keep = golden["attention_mask"][row]
        ids, marks = [], []
        for token, label in zip(golden["input_ids"][row][keep], golden["labels"][row][keep], strict=True):
            if token == -200:
                ids += [50] * 9 + [51] * len(objects[row])
                marks += [-100] * (9 + len(objects[row]))
            else:
                ids.append(token.item())
                marks.append(label.item())
        expanded.append(torch.tensor(ids))
        labels.append(torch.tensor(marks))
    input_ids = nn.utils.rnn.pad_sequence(expanded, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    merged, _ = model.merge_image_features(input_ids, model.get_input_embeddings()(input_ids), features)
    valid = golden["out_attention_mask"]
    torch.testing.assert_close(merged[valid], golden["out_inputs_embeds"][valid])
    assert torch.equal(labels, golden["out_labels"])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_what_its_rows_give_alone(model, padding_side):
    inputs = tiny_inputs(ROWS, padding_side=padding_side)
    if padding_side == "left":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs).logits
    for row, pictures in enumerate(PICTURES_OF_ROW):
        alone = model(**one_row(inputs, row, pictures)).logits[0]
        kept = logits[row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-4)


def test_padding_boxes_change_nothing(model):
    inputs = tiny_inputs([[2], [3]])
    other = copy.deepcopy(inputs)
    other["boxes"][0, 2] = torch.tensor([-5.0, float("nan"), 1e4, float("inf")])
    assert torch.equal(model(**inputs).logits, model(**other).logits)


def test_boxes_decide_the_answer(model):
    inputs = tiny_inputs([[2]])
    other = copy.deepcopy(inputs)
    other["boxes"][0, 1] = torch.tensor([0.0, 0.0, 8.0, 8.0])
    assert not torch.allclose(model(**inputs).logits, model(**other).logits)


def test_boxes_of_integer_dtype_are_the_same_boxes(model):
    inputs = tiny_inputs([[2]])
    inputs["boxes"] = inputs["boxes"].round()
    integers = inputs | {"boxes": inputs["boxes"].long()}
    assert torch.equal(model(**inputs).logits, model(**integers).logits)


def test_too_few_object_placeholders_name_both_numbers(model):
    inputs = tiny_inputs([[2]])
    inputs["num_boxes"] = torch.tensor([1])
    with pytest.raises(ValueError, match="2 object placeholders.* 1 object features"):
        model(**inputs)


def test_a_missing_picture_names_both_numbers(model):
    inputs = tiny_inputs([[2], [2]])
    for name in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes"):
        inputs[name] = inputs[name][:1]
    with pytest.raises(ValueError, match="8 image placeholders.* 4 image features"):
        model(**inputs)


def test_placeholders_without_pictures_are_refused(model):
    inputs = tiny_inputs([[2]])
    with pytest.raises(ValueError, match="6 placeholders.*no pictures"):
        model(input_ids=inputs["input_ids"])


def test_swapped_box_counts_are_refused(model):
    inputs = tiny_inputs([[1], [2]])
    inputs["num_boxes"] = torch.tensor([2, 1])
    with pytest.raises(ValueError, match="out of order"):
        model(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_high_res": None}, "without pixel_values_high_res"),
        (
            {"pixel_values": torch.zeros(2, 3, 27, 28)},
            r"pixel_values is \(2, 3, 27, 28\); expected \(2, 3, 28, 28\)",
        ),
        ({"pixel_values_high_res": torch.zeros(1, 3, 64, 64)}, "pixel_values_high_res is"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes is \(2, 4\); expected \(2, K_max, 4\)"),
        ({"num_boxes": torch.tensor([1])}, r"num_boxes is \(1,\); expected \(2,\)"),
        ({"boxes": None}, "num_boxes came without boxes"),
        (
            {"pixel_values": torch.zeros(0, 3, 28, 28), "pixel_values_high_res": torch.zeros(0, 3, 64, 64)},
            "holds no pictures",
        ),
    ],
)
def test_wrong_picture_inputs_are_named(model, pixel_inputs, change, message):
    with pytest.raises(ValueError, match=message):
        model.get_image_features(**{**pixel_inputs, **change})


def test_pictures_with_embeddings_are_refused(model, pixel_inputs):
    with pytest.raises(ValueError, match="expected input_ids"):
        model(inputs_embeds=torch.zeros(2, 8, 32), **pixel_inputs)


def test_loss_is_that_of_the_language_models_own_vocabulary(model):
    inputs = tiny_inputs([[2], []])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels)
    own = outputs.logits[:, :-1, :TEXT_VOCAB]
    target = labels[:, 1:].clone()
    target[target >= TEXT_VOCAB] = -100
    expected = nn.functional.cross_entropy(own.flatten(0, 1), target.flatten(), ignore_index=-100)
    torch.testing.assert_close(outputs.loss, expected)


def test_every_trained_part_gets_a_gradient_and_the_placeholders_get_none():
    model = tiny_model()
    inputs = tiny_inputs([[2], [1]])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    # Only what lies behind hidden state -2 of the ViT may stay out.
    assert all("layers.2." in name or "post_layernorm" in name for name in unused), unused
    assert not model.lm_head.weight.grad[[IMAGE, OBJECT]].any()


NECK = ("model.fusion.", "model.image_projector.", "model.object_projector.")


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_text_alone_gives_the_neck_gradients_of_zero(backend):
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_tower." not in name)
    inputs = tiny_inputs([[], []])
    with use_backend(backend):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith(NECK):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    assert torch.equal(loss, model.eval()(**inputs, labels=inputs["input_ids"]).loss)


def test_text_alone_passes_no_picture_where_nothing_of_the_vision_flow_learns():
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name)
    model.model.high_res_tower.register_forward_hook(lambda *args: pytest.fail("a picture was encoded"))
    inputs = tiny_inputs([[], []])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_modules_that_must_not_be_split_are_there(model):
    present = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer", "ConvGateFusion"} <= model._no_split_modules <= present


def test_frozen_parts_stay_in_eval_mode():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(NECK))
    model.gradient_checkpointing_enable()
    model.train()
    inner = model.model
    assert model.training
    assert inner.fusion.training
    for part in (inner.vision_tower, inner.high_res_tower):
        assert not any(module.training for module in part.modules())
    # Layers recompute in training mode only; what they hold, dropout above all, stays in eval mode.
    in_training = [m for m in inner.language_model.modules() if m.training]
    assert in_training == list(inner.language_model.layers)
    next(inner.language_model.parameters()).requires_grad_(True)
    model.train()
    assert all(module.training for module in inner.language_model.modules())
    assert not any(module.training for module in model.eval().modules())


def test_output_hidden_states(model):
    outputs = model(**tiny_inputs([[2]]), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert outputs.image_hidden_states.shape == (1, 4 + 2, 32)


def test_logits_to_keep(model):
    inputs = tiny_inputs([[2]])
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])


def test_a_tuple_on_request(model):
    inputs = tiny_inputs([[2]])
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    inputs = tiny_inputs([[2], [1]])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.fusion.high_res_conv.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision_stays_close(model, dtype, tolerance):
    inputs = tiny_inputs([[2], [1]])
    expected = model(**inputs).logits[..., :TEXT_VOCAB]
    logits = copy.deepcopy(model).to(dtype)(**inputs).logits[..., :TEXT_VOCAB]
    assert logits.dtype == dtype
    assert (logits.float() - expected).norm() < tolerance * expected.norm()


def test_attention_implementations_agree(model, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs([[2], [1]])
    eager = AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation={"text_config": "eager", "vision_config": "eager"}
    )
    assert eager.config.text_config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_vision_flow_compiles_as_one_graph(model):
    compiled_graphs = 0

    def count(graph, example_inputs):
        nonlocal compiled_graphs
        compiled_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    encode = torch.compile(model.model.get_image_features, fullgraph=True, backend=count)
    for rows in ([[2]], [[3]], [[1]], [[5], [2]], [[4], [4]], [[1], [7]], [[9]]):
        inputs = tiny_inputs(rows)
        pictures = [inputs[k] for k in ("pixel_values", "pixel_values_high_res", "boxes", "num_boxes")]
        expected = model.get_image_features(*pictures)
        for got, wanted in zip(encode(*pictures).pooler_output, expected.pooler_output, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # One picture and several pictures unroll differently (a list per picture), each static and then dynamic.
    assert compiled_graphs <= 4


LANGUAGE_MODELS = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "phi": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "gpt_neox": {},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "lm_head_multiplier": 0.3,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 5.0, "head_dim": 8},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
}


REFUSED = [("gemma3n", "change their logits")]
if (
    CACHE_NAME == "cache"
):  # transformers 5.24 keeps the states of state-space models where it keeps keys and values
    LANGUAGE_MODELS["mamba"] = {}
else:
    REFUSED.append(("mamba", "take no past_key_values"))


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_any_causal_language_model_keeps_its_own_logits(model_type):
    settings = {
        "vocab_size": TEXT_VOCAB + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 128,
    }
    text_config = AutoConfig.for_model(model_type, **{**settings, **LANGUAGE_MODELS[model_type]})
    causal = AutoModelForCausalLM.from_config(copy.deepcopy(text_config)).eval()
    model = MGLlavaForConditionalGeneration(tiny_config(text_config)).eval()
    model.model.language_model.load_state_dict(causal.base_model.state_dict())
    model.lm_head.load_state_dict(causal.get_output_embeddings().state_dict())
    input_ids = torch.randint(3, TEXT_VOCAB, (2, 7))
    torch.testing.assert_close(
        model(input_ids=input_ids).logits[..., :TEXT_VOCAB],
        causal(input_ids=input_ids).logits[..., :TEXT_VOCAB],
        rtol=1e-4,
        atol=1e-5,
    )
    answers = [
        model.generate(**tiny_inputs([[2]]), max_new_tokens=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize(("model_type", "message"), REFUSED)
def test_a_language_model_that_would_go_wrong_is_refused(model_type, message):
    text_config = AutoConfig.for_model(
        model_type,
        vocab_size=63,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
    )
    with pytest.raises(ValueError, match=message):
        language_model_head(text_config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_language_model_with_a_soft_cap_loads_in_half_precision(tmp_path, dtype):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text_config = AutoConfig.for_model("gemma2", vocab_size=63, head_dim=8, intermediate_size=48, **settings)
    model = MGLlavaForConditionalGeneration(tiny_config(text_config))
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)  # far beyond the cap
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert (
        loaded(**tiny_inputs([[2]])).logits[..., :TEXT_VOCAB].abs().max()
        <= text_config.final_logit_softcapping
    )


def test_rows_that_are_added_later_are_ordinary_tokens():
    model = tiny_model()
    model.resize_token_embeddings(TEXT_VOCAB + 9)
    inputs = tiny_inputs([[2]])
    inputs["input_ids"][0, -1] = TEXT_VOCAB + 5
    outputs = model(**inputs, labels=inputs["input_ids"])
    assert outputs.loss < 100
    lowest = torch.finfo(torch.float32).min
    assert (outputs.logits == lowest).all(dim=(0, 1)).nonzero().flatten().tolist() == [IMAGE, OBJECT]


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_through_the_auto_classes(tmp_path, tied):
    model = tiny_model(tiny_config(tiny_text_config(tie_word_embeddings=tied)))
    inputs = tiny_inputs([[2], [1]])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MGLlavaConfig
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is MGLlavaForConditionalGeneration
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MGLlavaModel
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_device_map_auto(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto")
    inputs = tiny_inputs([[2]])
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_weights_offloaded_to_disk_are_found(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model",
        device_map={"model.language_model": "cpu", "lm_head": "cpu", "model.vision_tower": "cpu"}
        | dict.fromkeys(
            ("model.high_res_tower", "model.fusion", "model.image_projector", "model.object_projector"),
            "disk",
        ),
        offload_folder=tmp_path / "offload",
    )
    inputs = tiny_inputs([[2]])
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("variant", ["gate_sum", "gate_concat", "concat_projected", "concat_raw"])
def test_fusion_variants_train(variant):
    model = tiny_model(tiny_config(fusion_variant=variant))
    inputs = tiny_inputs([[2]])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.image_projector.linear_1.weight.grad.abs().sum() > 0


def test_fresh_weights_follow_the_published_initialisation():
    model = MGLlavaForConditionalGeneration(tiny_config())
    fusion = model.model.fusion
    assert not fusion.high_res_proj.weight.any()
    assert not fusion.low_res_proj.weight.any()
    assert all(not p.any() for name, p in fusion.named_parameters() if name.endswith("bias"))
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.9 * bound < fusion.high_res_conv.weight.abs().max() <= bound
    assert model.model.high_res_tower.stages[0].blocks[0].gamma[0].item() == pytest.approx(1e-6)


def test_parts_missing_from_a_checkpoint_start_as_fresh_ones_do(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "fusion.low_res_proj" not in k and "gamma" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not loaded.model.fusion.low_res_proj.weight.any()
    assert torch.equal(loaded.model.fusion.high_res_proj.weight, model.model.fusion.high_res_proj.weight)
    assert (loaded.model.high_res_tower.stages[1].blocks[1].gamma == 1e-6).all()


def test_a_configuration_whose_grids_differ_is_refused():
    with pytest.raises(Exception, match=r"3x3 \(96 px / 32\).*2x2 \(28 px / 14\)"):
        tiny_config(
            high_res_config={
                "architecture": "test_convnext",
                "image_size": 96,
                "stage_widths": [24, 32, 48, 64],
            }
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roi_output_size": 0}, "roi_output_size is 0"),
        ({"vision_feature_layer": -5}, "vision_feature_layer is -5.*-4 to 3"),
        ({"image_token_id": 63}, "image_token_id is 63.*63 rows"),
        ({"object_token_id": IMAGE}, "expected two ids"),
        ({"text_vocab_size": 64}, "text_vocab_size is 64"),
        ({"fusion_variant": "sum"}, "gate_sum"),
        ({"text_config": {"model_type": "nope"}}, "'nope'"),
    ],
)
def test_a_wrong_configuration_is_named(settings, message):
    with pytest.raises(Exception, match=message):
        MGLlavaConfig(**{**tiny_config().to_dict(), **settings})


@pytest.mark.parametrize(
    ("high_res", "message"),
    [
        ({"architecture": "no_such_net"}, "no_such_net"),
        ({"architecture": "resnet18"}, "expected a timm ConvNeXt"),
        ({"stage_widths": [1, 2, 3, 4]}, r"\[24, 32, 48, 64\].*\[1, 2, 3, 4\]"),
    ],
)
def test_a_tower_that_is_not_what_the_configuration_says_is_refused(high_res, message):
    settings = {"architecture": "test_convnext", "image_size": HIGH_RES, "stage_widths": [24, 32, 48, 64]}
    with pytest.raises(ValueError, match=message):
        MGLlavaModel(tiny_config(high_res_config=settings | high_res))


def test_unknown_published_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="vicuna-7b, vicuna-13b, phi-3-mini, llama-3-8b, yi-1.5-34b"):
        MGLlavaConfig.published("vicuna")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("vicuna-7b", 7.4),
        ("vicuna-13b", 13.6),
        ("phi-3-mini", 4.2),
        ("llama-3-8b", 8.4),
        ("yi-1.5-34b", 34.9),
    ],
)
def test_published_models_have_the_published_size(name, billions):
    """Parameter counts of the paper's table, where it gives them to one digit; counted on the meta device."""
    with torch.device("meta"):
        model = MGLlavaForConditionalGeneration(MGLlavaConfig.published(name))
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert count == pytest.approx(billions, abs=0.25)


def test_the_vision_flow_crosses_devices():
    """Two GPUs that need not exist: fake tensors know their device, and refuse to mix two as real ones do."""
    with torch.device("meta"):
        model = MGLlavaModel(tiny_config()).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        places = {
            "vision_tower": 0,
            "high_res_tower": 1,
            "fusion": 0,
            "image_projector": 1,
            "object_projector": 0,
        }
        for name, index in places.items():
            part = getattr(model, name).to_empty(device=f"cuda:{index}")
            add_hook_to_module(part, AlignDevicesHook(execution_device=f"cuda:{index}"))
        pictures = {
            "pixel_values": torch.empty(2, 3, 28, 28, device="cuda:0"),
            "pixel_values_high_res": torch.empty(2, 3, HIGH_RES, HIGH_RES, device="cuda:0"),
            "boxes": torch.empty(2, 3, 4, device="cuda:0"),
            "num_boxes": torch.empty(2, dtype=torch.long, device="cuda:0"),
        }
        tokens = model.get_image_features(**pictures).pooler_output
    assert [tuple(rows.shape) for rows in tokens] == [(4 + 3, 32)] * 2
