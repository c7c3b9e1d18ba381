"""The model card of a converted model."""

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- mgllava
---

# {title}

An MG-LLaVA ([arXiv 2406.17770](https://arxiv.org/abs/2406.17770)) checkpoint in the format of the `mgllava`
package. It looks at a picture at low resolution ({low_res_size} px, CLIP ViT), at high resolution
({high_res_size} px, CLIP ConvNeXt) and at each detected object.

## Use

```python
import mgllava  # registers the model with transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{title}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{title}")
image = Image.open("picture.jpg")
detections = [{{"boxes": [[93, 23, 106, 64]], "labels": ["cup"], "scores": [0.9]}}]  # pixels of the picture

messages = [
    {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is on the table?"}}]}}
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, detections=detections, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Converted from

| part | source |
|---|---|
{sources}

Fusion `{fusion_variant}`, weights in {dtype}, {parameters:,} parameters. The parts' licences apply.
"""


def model_card(
    title: str,
    sources: dict[str, str],
    *,
    low_res_size: int,
    high_res_size: int,
    fusion_variant: str,
    dtype: str,
    parameters: int,
) -> str:
    """Markdown with the hub's metadata; `sources` maps each part to its file, folder or hub id."""
    rows = "\n".join(f"| {part} | {name} |" for part, name in sources.items())
    return _CARD.format(
        title=title,
        sources=rows,
        low_res_size=low_res_size,
        high_res_size=high_res_size,
        fusion_variant=fusion_variant,
        dtype=dtype,
        parameters=parameters,
    )
