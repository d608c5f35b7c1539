"""The image stream: a pure function of the seed and the step."""

import numpy as np
import torch

from distill.datasets.images import FIRST_NOISE, ImageStream, InMemory
from distill.flow.noise import sample_noise

N = 10


def stream(rank=0, world_size=1, label_dropout=0.0, seed=1, batch_size=4, **more):
    images = torch.arange(N).float().reshape(N, 1, 1, 1).expand(N, 1, 2, 2).contiguous()
    shown = InMemory(images.numpy(), np.arange(N))
    return ImageStream(shown, seed, batch_size, rank, world_size, label_dropout, **more)


def shown(batch):
    return batch.states[:, 0, 1, 0, 0, 0].long().tolist()


def test_every_epoch_shows_every_image_once_in_another_order():
    reader = stream(batch_size=5)
    order = [image for step in range(6) for image in shown(reader.read(step))]
    epochs = [order[first : first + N] for first in range(0, 3 * N, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_ranks_together_read_the_same_batches():
    for step in range(6):
        whole = stream().read(step)
        whole.check()
        for world_size in (2, 4):
            for rank in range(world_size):
                part = stream(rank, world_size).read(step)
                index = torch.arange(rank, 4, world_size)
                assert torch.equal(part.positions, index)
                assert torch.equal(part.ids, whole.ids[index])
                assert torch.equal(part.condition, whole.condition[index])
                assert torch.equal(part.states, whole.states[index])


def test_any_step_can_be_read_first():
    reader = stream()
    in_order = [reader.read(step) for step in range(8)]
    assert torch.equal(stream().read(7).states, in_order[7].states)
    assert torch.equal(reader.read(2).states, in_order[2].states)


def test_noise_is_that_of_ids_no_trajectory_uses_and_labels_follow_the_image():
    batch = stream().read(3)
    assert batch.ids.tolist() == [12, 13, 14, 15]
    assert torch.equal(
        batch.noise, torch.from_numpy(sample_noise(1, batch.ids.numpy() + FIRST_NOISE, (1, 2, 2)))
    )
    assert batch.condition.tolist() == shown(batch)


def test_labels_are_dropped_at_the_asked_rate():
    reader = stream(label_dropout=0.25, batch_size=1000)
    dropped = torch.cat([reader.read(step).condition == -1 for step in range(10)])
    assert abs(float(dropped.float().mean()) - 0.25) < 0.02
    assert stream(label_dropout=0.0).read(0).condition.min() >= 0


def test_flips_mirror_half_of_the_images_and_nothing_else():
    images = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    plain, flipped = (
        ImageStream(InMemory(images, np.arange(2)), 1, 1000, 0, 1, 0.0, flips).read(0)
        for flips in (False, True)
    )
    before, after = plain.states[:, 0, 1], flipped.states[:, 0, 1]
    mirrored = (before.flip(-1) == after).flatten(1).all(1)
    same = (before == after).flatten(1).all(1)
    assert (mirrored ^ same).all() and abs(float(mirrored.float().mean()) - 0.5) < 0.05
    assert torch.equal(plain.noise, flipped.noise) and torch.equal(
        plain.condition, flipped.condition
    )


def test_worker_processes_give_the_same_batches_from_any_step():
    plain, ahead = stream(label_dropout=0.3), stream(label_dropout=0.3, workers=2)
    for step in (5, 6, 7, 2, 3):
        one, other = plain.read(step), ahead.read(step)
        assert torch.equal(one.states, other.states) and torch.equal(one.condition, other.condition)
    assert ahead.wait_s > 0
