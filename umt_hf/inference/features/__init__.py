"""Features of videos of any length: a UMT encoder slides over their frames and files hold what it sees."""

from .files import FeatureReport, load_encoder, name_features, save_features
from .windows import VideoFeatures, choose_frames, extract_features, plan_windows

__all__ = [
    "FeatureReport",
    "VideoFeatures",
    "choose_frames",
    "extract_features",
    "load_encoder",
    "name_features",
    "plan_windows",
    "save_features",
]
