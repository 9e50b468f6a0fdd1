"""Registry of the stages. A new stage is one module and one entry here, with a section in the recipe."""

from dgmr_tp.pipeline.stages.base import Stage
from dgmr_tp.pipeline.stages.compare import CompareStage
from dgmr_tp.pipeline.stages.distill import DistillStage
from dgmr_tp.pipeline.stages.evaluate import EvaluateStage
from dgmr_tp.pipeline.stages.export import ExportStage
from dgmr_tp.pipeline.stages.prune import PruneStage
from dgmr_tp.pipeline.stages.rank import RankStage
from dgmr_tp.pipeline.stages.recover import RecoverStage
from dgmr_tp.pipeline.stages.scenes import ScenesStage
from dgmr_tp.pipeline.stages.tune_text import TuneTextStage

STAGES: tuple[Stage, ...] = (
    ScenesStage(),
    RankStage(),
    PruneStage(),
    RecoverStage(),
    DistillStage(),
    TuneTextStage(),
    EvaluateStage(),
    CompareStage(),
    ExportStage(),
)
"""All stages in the order in which they run."""
STAGE_NAMES = tuple(stage.name for stage in STAGES)
