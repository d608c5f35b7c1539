"""What reading images costs a trainer rank: share of its two cores at 500 images/s, and memory.

    python benchmarks/images.py FOLDER        # a folder for 20,000 JPEGs of 64 x 64, made if empty

A rank with one worker process reads batches as fast as that gives. CPU time of the rank and its
worker, by the operating system, over the images read, times 500, over two cores. Noise is counted
apart: it is drawn whatever the images come from. Memory is that of both processes, with a manifest
as large as ImageNet's.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill.datasets import manifest
from distill.datasets.config import DataConfig
from distill.datasets.files import ImageFiles
from distill.datasets.images import ImageStream
from distill.flow.noise import sample_noise

COUNT, SIZE, BATCH, STEPS, RATE, CORES = 20_000, 64, 128, 60, 500, 2
IMAGENET = 1_281_167


def make(folder: Path) -> None:
    """JPEGs with the structure of photographs: noise at several scales, in ten class folders."""
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        total = np.zeros((SIZE, SIZE, 3))
        for side in (4, 8, 16, 32, 64):
            coarse = generator.normal(128, 400 / side, (side, side, 3)).clip(0, 255)
            picture = Image.fromarray(coarse.astype(np.uint8)).resize((SIZE, SIZE), 3)
            total += np.asarray(picture) / 5
        path = folder / str(index % 10) / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(total.astype(np.uint8)).save(path, quality=90)


def of_noise() -> float:
    """CPU seconds of the noise of one image."""
    began = time.process_time()
    sample_noise(0, np.arange(4 * BATCH), (3, SIZE, SIZE))
    return (time.process_time() - began) / (4 * BATCH)


def of_reading(images: ImageFiles) -> float:
    """CPU seconds of one image's bytes, hash, decoding and crop."""
    began = time.process_time()
    images.read(np.arange(4 * BATCH))
    return (time.process_time() - began) / (4 * BATCH)


def of_stream(images: ImageFiles) -> tuple[float, float]:
    """CPU seconds of an image in rank and worker, noise too; bytes of both that are not shared."""
    stream = ImageStream(images, 0, BATCH, 0, 1, 0.1, flips=True, workers=1)
    stream.read(0)
    me = psutil.Process()
    everyone = [me, *me.children()]
    began = [one.cpu_times() for one in everyone]
    for step in range(1, STEPS):
        stream.read(step)
    ended = [one.cpu_times() for one in everyone]
    spent = sum(b.user + b.system - a.user - a.system for a, b in zip(began, ended, strict=True))
    memory = sum(one.memory_full_info().uss for one in everyone)
    return spent / (BATCH * (STEPS - 1)), memory


def as_large_as_imagenet(images: ImageFiles) -> None:
    """Repeats the entries until there are as many as ImageNet has, names of files too."""
    small = images._manifest
    times = -(-IMAGENET // len(small.labels))

    def repeated(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array] * times)[:IMAGENET]

    images._manifest = manifest.Manifest(
        small.root, small.folder, small.about, repeated(small.files), repeated(small.places),
        repeated(small.labels), repeated(small.modes), repeated(small.sizes),
        repeated(small.sha256),
    )  # fmt: skip
    images._kept = np.arange(IMAGENET)
    images.labels = repeated(images.labels)


def main() -> None:
    folder = Path(sys.argv[1])
    if not folder.exists():
        make(folder)
    path = str(folder)
    data = DataConfig(name="folder", path=path, channels=3, size=SIZE, num_classes=10, crop="adm")
    images = ImageFiles(data, print)
    reading, noise = of_reading(images), of_noise()
    as_large_as_imagenet(images)
    stream, memory = of_stream(images)
    found = {
        "reading": reading * RATE / CORES,
        "noise": noise * RATE / CORES,
        "stream_with_noise": stream * RATE / CORES,
        "bytes_of_rank_and_worker": memory,
        "images": IMAGENET,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
