from engine.run import *  # noqa
from engine.run import existing_results as existing_outputs  # noqa
from engine.training import *  # noqa
from engine.run import recorded_data_dir, sole_run  # noqa

TRIAL_LOCKS = ".locks"
