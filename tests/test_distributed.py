"""Several processes on the CPU do what one does."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY

import distributed
from model.data_loader import SegmentationDataset, Split, class_names, make_loader
from model.net import FCN_GCN
from train import Training, train_epoch
from utils import Params


def on_processes(count: int, function: Callable[..., Any], *args: Any) -> list:
    """What function returns in each of count connected processes, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # importing torch anew takes longer than most of these tests
    results = context.Queue()

    def work(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {key: str(value) for key, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with distributed.processes("cpu"):
                results.put((rank, function(*args)))
        except BaseException as error:
            results.put((rank, error))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    answers = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [answers[rank] for rank in range(count)]


def train_in_float64(data, options: dict) -> dict:
    params = Params(**TINY | options)
    names = class_names(data, params.num_classes)
    dataset = SegmentationDataset(
        Split.find(data, "train"), class_names=names, image_size=params.image_size, augment=params.augment
    )
    loader = make_loader(dataset, batch_size=params.batch_size, seed=1, **params.loading_options())
    torch.manual_seed(1 + distributed.rank() * ("same start" not in options))
    training = Training(FCN_GCN(**params.network_options(), pretrained=False).double(), params, len(loader))
    torch.manual_seed(2)
    forward = training.forward
    training.forward = lambda x: forward(x.double())
    metrics = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        metrics.append(train_epoch(training, loader))
        training.epoch += 1
    return {"metrics": metrics, "weights": {k: v.numpy() for k, v in training.model.state_dict().items()}, "random": torch.get_rng_state().numpy(),
     "average": {k: v.numpy() for k, v in training.predictor.state_dict().items()}}
