"""Training tokens per second: batches of similar lengths against random ones, side by side in one run.

    python tests/benchmarks/bucketing.py tickets
    python tests/benchmarks/bucketing.py sst2 data.folder=FOLDER
    python tests/benchmarks/bucketing.py ag_news data.folder=FOLDER

Real tokens count, padding does not. The two ways alternate, so that a machine which slows down slows both; the last
line is JSON.
"""

import json
import platform
import statistics
import sys
import time

import torch

from models.assembly import build_dataset, build_model, describe_model
from models.dataloader import build_loader
from models.optimization import build_optimizer, build_warmup_cosine
from models.recipe import Recipe, load_recipe
from models.reproducibility import reproducible
from models.sampler import TrainingSampler
from models.trainer import Trainer

ROUNDS = 5
CPU = torch.device("cpu")


def main() -> None:
    name, *overrides = sys.argv[1:] or ["tickets"]
    recipe = load_recipe(name, overrides)
    with reproducible(recipe.seed, CPU, threads=recipe.trainer.threads):
        print(json.dumps(compare(recipe)))


def compare(recipe: Recipe) -> dict[str, object]:
    """Alternates one epoch of each, `ROUNDS` times after one to warm up."""
    dataset = build_dataset(recipe)
    lengths = dataset.train.lengths
    if lengths is None:
        raise SystemExit(f"the samples of {recipe.name} all have the same size: there is nothing to bucket")
    speeds: dict[str, list[float]] = {"random": [], "bucketed": []}
    padding: dict[str, float] = {}
    trainers = {}
    for way in speeds:
        model = build_model(describe_model(recipe, dataset))
        optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.0)
        scheduler = build_warmup_cosine(optimizer, max_learning_rate=1e-4, total_steps=10**6, warmup_fraction=0.5)
        trainers[way] = Trainer(model, optimizer=optimizer, scheduler=scheduler, max_grad_norm=1.0, device=CPU)
    for number in range(ROUNDS + 1):
        for way, trainer in trainers.items():
            sampler = TrainingSampler(
                len(dataset.train),
                batch_size=recipe.trainer.batch_size,
                seed=recipe.seed,
                lengths=lengths if way == "bucketed" else None,
            )
            sampler.set_position(number)
            batches = list(build_loader(dataset.train, sampler, dataset.collate, device=CPU))
            tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
            padding[way] = 1 - tokens / sum(batch.inputs["input_ids"].numel() for batch in batches)
            started = time.perf_counter()
            trainer.train_epoch(batches)
            speed = tokens / (time.perf_counter() - started)
            if number:
                speeds[way].append(speed)
                print(f"round {number} {way:>9}: {speed:10,.0f} tokens/s, {padding[way]:.1%} padding", flush=True)
    ratios = [bucketed / random for bucketed, random in zip(speeds["bucketed"], speeds["random"], strict=True)]
    return {
        "recipe": recipe.name,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "tokens_per_s": {way: round(statistics.median(values)) for way, values in speeds.items()},
        "padding_share": {way: round(value, 4) for way, value in padding.items()},
        "batch_size": recipe.trainer.batch_size,
        "threads": recipe.trainer.threads,
        "rounds": ROUNDS,
        "machine": platform.machine(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
