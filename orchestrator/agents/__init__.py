"""The processes of a rank: the agent that Ray starts, its fork server, and the trainer that it keeps alive."""
