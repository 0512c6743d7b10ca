"""The road from "written" to "durable", and back after a crash; and the room that it needs."""
