"""Training on a GPU: bfloat16, 4 bits, paged optimisers; skipped where there is none.

pytest tests/training/test_gpu.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi_mm.assembly import assemble, load_run
from phi_mm.training import begin_or_resume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = "training.use_cpu=false"


@pytest.mark.parametrize("optimiser", ["adamw_torch_fused", "paged_adamw_8bit"])
def test_qlora_resumes_and_its_run_answers(trainer, recipe, tmp_path: Path, optimiser: str):
    made = recipe(
        ON_GPU, f"training.optim={optimiser}", "training.save_steps=2", "training.max_steps=4"
    )
    assert made.computes == "bfloat16"
    begin_or_resume(made)
    straight = trainer(made)
    straight.train()
    straight.save_model(made.run_dir)
    resumed = trainer(made)
    resumed.train(resume_from_checkpoint=str(made.run_dir / "checkpoint-2"))
    resumed.save_model(tmp_path / "resumed")
    ends = [
        load_file(run / "adapter_model.safetensors") for run in (made.run_dir, tmp_path / "resumed")
    ]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-5, rtol=1e-3, msg=name)
    model, processor = load_run(made.run_dir)
    inputs = processor(text="Instruct: say a word\nOutput:", return_tensors="pt").to(model.device)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.device.type == "cuda" and answer.shape[1] > inputs["input_ids"].shape[1]


def test_packed_conversations_keep_apart(trainer, recipe):
    run = trainer(recipe(ON_GPU, tune="lora"))
    rows = [run.train_dataset[number] for number in range(6)]
    run.model.cuda().eval()
    losses = []
    for batch in (run.data_collator(rows), run.data_collator([rows])):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            losses.append(run.model(**{k: v.cuda() for k, v in batch.items()}).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_gpu_computes_as_the_cpu_does(trainer, recipe):
    made = recipe("model.dtype=float32", tune="frozen")
    torch.manual_seed(0)
    model, _ = assemble(made)
    run = trainer(made)
    batch = run.data_collator([run.train_dataset[number] for number in range(4)])
    with torch.no_grad():
        here = model(**batch).loss
        there = model.cuda()(**{k: v.cuda() for k, v in batch.items()}).loss
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)
