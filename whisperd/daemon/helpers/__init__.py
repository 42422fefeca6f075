"""The daemon's side of a helper: how it is started, fed, watched and ended. What it works on is the lanes' matter."""
