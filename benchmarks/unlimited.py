"""SQL that sets limits which a benchmark cannot reach; autotag still checks them for every call."""

UNLIMITED = b"""
    update autotag.settings set realtime_max_images = 50, realtime_requests_per_minute = 1000000,
      realtime_tokens_per_minute = 1000000000;
    update autotag.provider_limits set requests_per_minute = 2000000, tokens_per_minute = 2000000000,
      requests_per_day = null, requests_left = 2000000, tokens_left = 2000000000"""
