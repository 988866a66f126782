"""What this package needs of JAX beyond its public interface, and one walker over programs."""
