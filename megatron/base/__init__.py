"""The ground everything stands on: errors, atomic files, printing. No third-party imports."""
