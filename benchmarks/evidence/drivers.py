"""The pages, each with the module that measures it."""

from collections.abc import Mapping

from benchmarks.evidence import interference, pictures, plugins, routers, scaling, sounds, speech
from benchmarks.evidence.page import Driver

DRIVERS: Mapping[str, Driver] = {
    "interference": interference,
    "pictures": pictures,
    "plugins": plugins,
    "sounds": sounds,
    "speech": speech,
    "scaling": scaling,
    "routers": routers,
}
