//! The memory agent.
