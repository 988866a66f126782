"""Trackers: where the records of a run go."""

from jmp_train.records.trackers.named import TrackerName, make_trackers
from jmp_train.records.trackers.tracker import Tracker
from jmp_train.records.trackers.trackers import Trackers

__all__ = ["Tracker", "TrackerName", "Trackers", "make_trackers"]
