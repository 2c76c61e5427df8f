"""Optional one-sided transports: NIXL, Mooncake."""
