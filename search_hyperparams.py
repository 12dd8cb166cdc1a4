"""Run a sweep: one train.py per trial. parent_dir holds params.json, the base, and search_space.json, what varies."""

import argparse
import shlex
import sys
from collections import Counter

from optuna.trial import TrialState

from engine.cli import add_folder, positive, require, run_main
from engine.folders import better_of, sole_run
from engine.ranks import visible_gpus
from model import UserError
from params import Params
from sweep.coordinator import Coordinator, refuse_other
from sweep.space import distributions, grid, grid_distributions, read_spaces
from sweep.study import Study
from utils import read_json

WORDS = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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


def print_summary(study: Study) -> int:
    """Print how the sweep stands. Returns the exit status: 1 if a trial has failed."""
    trials = study.trials()
    counts = Counter(trial.state for trial in trials.values())
    scores = {name: trial.value for name, trial in trials.items() if trial.state == TrialState.COMPLETE}
    line = ", ".join(f"{counts[state]} {word}" for state, word in WORDS.items() if counts[state])
    if scores:
        best = better_of(study.metric)(scores, key=lambda name: scores[name])
        line += f"; best {study.metric} {scores[best]:.4f} by {best}"
    print(f"{len(trials)} trial{'s' * (len(trials) != 1)}: {line}")
    if len(trials) < study.n_trials:
        print(f"no more than these {len(trials)} were found in the search space")
    if counts[TrialState.FAIL]:
        print("the same command runs the failed ones again")
    print(f"table and plots: python synthesize_results.py --parent_dir {shlex.quote(str(study.parent_dir))}")
    return 1 if counts[TrialState.FAIL] else 0


def main(args: argparse.Namespace) -> int:
    base_file, space_file = args.parent_dir / "params.json", args.parent_dir / "search_space.json"
    Params.load(base_file)
    base, spaces = read_json(base_file, if_absent=""), read_spaces(space_file)
    trials = grid(spaces, base, space_file) if args.sampler == "grid" else {}
    space = grid_distributions(trials.values()) if trials else distributions(spaces, base, space_file)
    datasets = {(base | values).get("dataset", Params.dataset) for values in trials.values() or [{}]}
    if datasets != {"sample"} and not args.data_dir.is_dir():
        raise UserError(f"no folder {args.data_dir}; say where the data set is with --data_dir")
    gpus = [] if args.cluster else visible_gpus()
    if 0 < len(gpus) < (args.jobs or 1):
        raise UserError(f"--jobs {args.jobs}: every trial has a GPU to itself, and there are {len(gpus)}; lower it")
    cluster = None
    if args.cluster:
        require("ray", "a sweep on a cluster")
        from sweep.cluster import Cluster

        cluster = Cluster(args.cluster)
    jobs = args.jobs or (cluster.gpus or cluster.machines if cluster else 1)
    with sole_run(args.parent_dir, "search_hyperparams.py"):
        for name, values in trials.items():
            refuse_other(args.parent_dir / name, base | values)
        study = Study(args.parent_dir, base, space, trials, args.n_trials or 0, args.sampler == "tpe")
        sweep = Coordinator(study, args.data_dir, jobs, gpus, cluster, args.prune)
        sweep.run()
        if not sweep.signals:
            return print_summary(study)
    print("interrupted; the same command resumes the sweep", file=sys.stderr)
    return 128 + sweep.signals[0]


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
