from engine.devices import *  # noqa
