"""What each bench of the lab computes: functions of the levels below, without any web code."""
