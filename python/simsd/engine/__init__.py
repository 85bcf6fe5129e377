"""Requests in, updates out: schedules slots, runs iterations, delivers what they bring."""
