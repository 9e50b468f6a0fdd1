"""Call the compression functions with bare towers and plain image batches, which are what most tests have.

The library converts both once, at its public entry points. These functions do the same conversion for the tests.
"""

from dgmr_tp.compression import amp_search, planning, rankings
from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.encoders import OpenedModel, wrap_tower


def opened(model):
    """Return an ``OpenedModel`` unchanged, or wrap a bare tower."""
    return model if isinstance(model, OpenedModel) else wrap_tower(model)


def calibration(images, model, count=None, seed=0):
    """Return batches or an image source as ``CalibrationImages``, or None if there are no images."""
    return None if images is None else CalibrationImages.read(images, opened(model), count, seed)


def make_plan(model, criterion="dgmr", images=None, **options):
    return planning.make_plan(opened(model), criterion, calibration(images, model), **options)


def rank(model, criterion="output", images=None, **options):
    return rankings.rank(opened(model), criterion, calibration(images, model), **options)


def search(model, images, *, threshold, objective=None, journal=None, **config):
    config = amp_search.SearchConfig.model_validate(config)
    images = calibration(images, model)
    return amp_search.search(
        opened(model), images, threshold=threshold, config=config, objective=objective, journal=journal
    )


def block_sites(model):
    return opened(model).sites
