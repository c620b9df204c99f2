"""Video clips, photos and synthetic line art; training windows and how they are degraded."""
