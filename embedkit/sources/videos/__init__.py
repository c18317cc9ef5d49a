"""Frames of videos."""

from embedkit.sources.videos.listing import VIDEO_SUFFIXES, list_video, list_videos

__all__ = ["VIDEO_SUFFIXES", "list_video", "list_videos"]
