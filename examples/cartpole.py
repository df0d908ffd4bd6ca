"""Games: an actor and a critic learn to balance a pole (gymnasium's CartPole-v1; 500 is the highest return).

Advantage actor-critic with generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438) in 16 games at
once, improved in a few clipped steps a batch (PPO, Schulman et al. 2017, arXiv:1707.06347).
"""

import sys

import gymnasium
import numpy as np
import torch
from _program import finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn

GAMES, HORIZON, DISCOUNT, LAMBDA, CLIP = 16, 64, 0.99, 0.95, 0.2


class Player(nn.Module):
    """Logits of the two moves, and what return to expect."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )
        self.critic = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``(N, 2)`` and values ``(N,)`` of states ``(N, 4)``."""
        return F.log_softmax(self.actor(x), dim=-1), self.critic(x)[:, 0]


def advantages(rewards: Tensor, values: Tensor, last: Tensor, ended: Tensor) -> Tensor:
    """Return by how much each move ``(T, N)`` turned out better than expected."""
    found, running = torch.zeros_like(rewards), torch.zeros_like(last)
    following = torch.cat([values[1:], last[None]])
    for t in reversed(range(len(rewards))):
        surprise = rewards[t] + DISCOUNT * following[t] * ~ended[t] - values[t]
        running = found[t] = surprise + DISCOUNT * LAMBDA * running * ~ended[t]
    return found


def play(player: Player, games: int, seed: int) -> float:
    """Return the mean return over ``games`` new games, playing the likelier move."""
    returns = []
    game = gymnasium.make("CartPole-v1")
    for i in range(games):
        state, _ = game.reset(seed=seed + i)
        total, over = 0.0, False
        while not over:
            with torch.no_grad():
                move = player(torch.from_numpy(state)[None])[0].argmax().item()
            state, reward, fallen, timeout, _ = game.step(move)
            total += float(reward)
            over = fallen or timeout
        returns.append(total)
    return float(np.mean(returns))


def main() -> int:
    """Play and learn in turn; at the end play 20 new games."""
    options = parser(__doc__, "cartpole")
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--lr", type=float, default=2.5e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    rounds = 2 if args.small else args.rounds

    player = Player()
    optimizer = torch.optim.Adam(player.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, rounds)
    envs = gymnasium.make_vec(
        "CartPole-v1",
        GAMES,
        "sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
    )
    state = torch.from_numpy(envs.reset(seed=args.seed)[0])
    with torchbp.watch(player, optimizer, log_dir=args.log_dir) as monitor:
        for _ in track(range(rounds), rounds, "playing"):
            seen: list[tuple[Tensor, ...]] = []
            for _ in range(HORIZON):
                with torch.no_grad():
                    chances, value = player(state)
                move = torch.multinomial(chances.exp(), 1)
                after, reward, fallen, timeout, _ = envs.step(move[:, 0].numpy())
                ended = torch.from_numpy(fallen | timeout)
                seen.append(
                    (
                        state,
                        move,
                        chances.gather(1, move)[:, 0],
                        value,
                        torch.from_numpy(reward).float(),
                        ended,
                    )
                )
                state = torch.from_numpy(after)
            states, moves, before, values, rewards, ended = map(
                torch.stack, zip(*seen, strict=True)
            )
            with torch.no_grad():
                gain = advantages(rewards, values, player(state)[1], ended)
            monitor.log("game/length", HORIZON * GAMES / max(ended.sum().item(), 1))
            rows = [t.flatten(0, 1) for t in (states, moves, before, gain, gain + values)]
            for picked in (p for _ in range(4) for p in torch.randperm(HORIZON * GAMES).split(256)):
                x, move, old, better, target = (t[picked] for t in rows)
                chances, value = player(x)
                ratio = (chances.gather(1, move)[:, 0] - old).exp()
                better = (better - better.mean()) / (better.std() + 1e-8)
                policy = -torch.minimum(
                    ratio * better, ratio.clamp(1 - CLIP, 1 + CLIP) * better
                ).mean()
                entropy = -(chances * chances.exp()).sum(-1).mean()
                loss = policy + 0.5 * F.smooth_l1_loss(value, target) - 0.01 * entropy
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(player.parameters(), 0.5)
                optimizer.step()
                monitor.log("loss/actor and critic", loss)
            schedule.step()
        result = play(player, 2 if args.small else 20, seed=10_000)
        monitor.log("game/return", result)
    envs.close()
    return finish(
        args,
        {"mean return of 20 new games": result},
        promised={"the mean return is at least 450": result >= 450},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
