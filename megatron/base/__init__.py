"""The ground everything stands on: errors, atomic files, safe unpickling. No third-party imports."""
