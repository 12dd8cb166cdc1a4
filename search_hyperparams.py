"""Run a sweep: one train.py per trial. parent_dir holds params.json, the base, and search_space.json, what varies."""

import argparse
import os
import shlex
from collections import Counter
from statistics import fmean
from typing import Any

import torch
from optuna.trial import TrialState

from engine.cli import add_folder, positive, require, run_main
from engine.results import without_seed
from engine.run import RUN_LOCK, sole_run
from engine.training import better_of
from model import UserError
from params import Params
from sweep.coordinator import Coordinator, drawn_before, outcome
from sweep.space import distributions, grid, grid_distributions, read_spaces, trial_name
from utils import read_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_folder(parser, "--parent_dir", "experiments/learning_rate", "folder of the sweep")
    add_folder(parser, "--data_dir", "data", "folder of the data set")
    parser.add_argument("--sampler", choices=("grid", "random", "tpe"), default="grid", help="(default: %(default)s)")
    parser.add_argument("--n_trials", type=positive, metavar="N", help="trials in all, for random and tpe")
    parser.add_argument("--jobs", type=positive, metavar="N", help="trials at once (default: 1, or all of a cluster)")
    prune = "end trials worse than the others' median, from this epoch on (default: the first after warm-up)"
    parser.add_argument("--prune", type=positive, nargs="?", const=0, metavar="EPOCH", help=prune)
    parser.add_argument("--cluster", metavar="ADDRESS", help="run the trials on the Ray cluster at this address")
    args = parser.parse_args()
    if (args.sampler == "grid") != (args.n_trials is None):
        parser.error("--n_trials goes with --sampler random or tpe, which need it; a grid runs every combination")
    return args


def make_coordinator(args: argparse.Namespace) -> Coordinator:
    """Read the sweep's files and folders. Raises UserError for a mistake in them or in the flags."""
    base_file, space_file = args.parent_dir / "params.json", args.parent_dir / "search_space.json"
    Params.load(base_file)
    base, spaces = read_json(base_file, if_absent=""), read_spaces(space_file)
    if args.sampler == "grid":
        trials = grid(spaces, base, space_file)
        space = grid_distributions(trials.values())
    else:
        space = distributions(spaces, space_file)
        trials = drawn_before(args.parent_dir, space)
    datasets = {(base | values).get("dataset", "voc") for values in trials.values() or [{}]}
    if datasets != {"sample"} and not args.data_dir.is_dir():
        raise UserError(f"no folder {args.data_dir}; say where the data set is with --data_dir")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = [name for part in listed.split(",") if (name := part.strip()) not in ("", "-1")]
    cluster, jobs = None, args.jobs or 1
    if args.cluster:
        require("ray", "a sweep on a cluster")
        from sweep.cluster import Cluster

        cluster = Cluster(args.cluster, args.jobs)
        gpus, jobs = [], cluster.jobs
    if 0 < len(gpus) < jobs:
        raise UserError(f"--jobs {jobs}: every trial has a GPU to itself, and there are {len(gpus)}; lower it")
    options = {"n_trials": args.n_trials or 0, "tpe": args.sampler == "tpe", "prune_from": args.prune}
    folders = args.parent_dir, args.data_dir
    return Coordinator(*folders, base, space, trials, jobs=jobs, gpus=gpus, cluster=cluster, **options)


def best(sweep: Coordinator) -> str:
    """Return the best value and whose it is: of trials that differ in their seed only, the mean over the finished."""
    groups: dict[str, dict[str, Any]] = {}
    for trial in sweep.study.get_trials(states=[TrialState.COMPLETE]):
        name = trial.user_attrs["folder"]
        alike = trial_name({key: value for key, value in sweep.trials[name].items() if key != "seed"})
        groups.setdefault(alike, {})[name] = trial.value
    group = better_of(sweep.metric)(groups.values(), key=lambda group: fmean(group.values()))
    name, value = next(iter(group)), fmean(group.values())
    if len(group) == 1:
        return f"{value:.4f} by {name}"
    shared = without_seed(name, sweep.trials[name].get("seed"), sweep.parent_dir.resolve().name)
    return f"{value:.4f} by {shared}, mean of {len(group)} seeds"


def print_summary(sweep: Coordinator) -> int:
    """Print how the sweep stands. Returns the exit status: 1 if a trial has failed."""
    count, states = len(sweep.trials), Counter(outcome(sweep.parent_dir / name)[0] for name in sweep.trials)
    line = ", ".join(f"{states[state]} {state}" for state in ("finished", "pruned", "failed") if states[state])
    if sweep.mixed:
        line += f"; trials of different {', '.join(sweep.mixed)} are not ranked"
    elif states["finished"]:
        line += f"; best {sweep.metric} {best(sweep)}"
    print(f"{count} trial{'s' * (count != 1)}: {line}")
    if states["failed"]:
        print("the same command runs the failed ones again")
    folder, seeds = shlex.quote(str(sweep.parent_dir)), {values.get("seed") for values in sweep.trials.values()}
    if states["finished"]:
        print(f"score at the photos' own size: python evaluate.py --model_dir {folder} --original_size")
    over_seeds = " --over_seeds" * (len(seeds) > 1)
    print(f"table and plots: python synthesize_results.py --parent_dir {folder}{over_seeds}")
    return 1 if states["failed"] else 0


def main(args: argparse.Namespace) -> int:
    sweep = make_coordinator(args)
    with sole_run(args.parent_dir, "search_hyperparams.py"):
        for folder in filter(lambda folder: (folder / RUN_LOCK).exists(), map(args.parent_dir.joinpath, sweep.trials)):
            with sole_run(folder):  # or else a train.py that a killed coordinator has left is at work there
                pass
        try:
            sweep.run()
        except KeyboardInterrupt as error:
            raise type(error)("interrupted; the same command resumes the sweep") from None
    return print_summary(sweep)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
