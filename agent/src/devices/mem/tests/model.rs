// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A naive model: one bit for each block, and the rules once more, block by block.

use super::*;

struct Model {
    plugged: Vec<bool>,
    requested: u64,
    usable: u64,
    first: bool,
    busy: bool,
}

#[derive(Debug, Clone)]
enum Step {
    Request(Request),
    SetRequestedSize(u64),
    Connected,
    Reset,
    Job(bool),
    /// The device is saved, and loaded on the same memory.
    Moved,
}

impl Model {
    fn needed(&self) -> u64 {
        if self.requested == 0 { 0 } else { (self.requested + EXTENT).min(BLOCKS) }
    }

    /// The blocks of a request, if all of them are usable.
    fn blocks(&self, run: BlockRun) -> Option<Vec<usize>> {
        let blocks = (0..u128::from(run.count)).map(|block| {
            let addr = u128::from(run.addr) + block * u128::from(BLOCK);
            (0..self.usable).find(|block| u128::from(ADDR + block * BLOCK) == addr)
        });
        let blocks: Vec<_> = blocks.map(|block| block.map(|block| block as usize)).collect();
        blocks.into_iter().collect::<Option<Vec<_>>>().filter(|blocks| !blocks.is_empty())
    }

    fn count(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64
    }

    fn set(&mut self, blocks: &[usize], plugged: bool) {
        blocks.iter().for_each(|block| self.plugged[*block] = plugged);
    }

    fn answer(&mut self, request: Request) -> Response {
        let first = std::mem::take(&mut self.first);
        let run = match request {
            Request::Plug(run) | Request::Unplug(run) | Request::State(run) => run,
            Request::UnplugAll => {
                self.plugged.fill(false);
                self.usable = self.needed();
                return Response::Ack;
            }
            Request::Unknown(_) => return Response::Error,
        };
        let Some(blocks) = self.blocks(run) else { return Response::Error };
        let plugged = blocks.iter().filter(|block| self.plugged[**block]).count();
        let (all, none) = (plugged == blocks.len(), plugged == 0);
        match request {
            Request::Plug(_) if first && all => Response::Ack,
            Request::Plug(_) if !first && !none => Response::Error,
            Request::Plug(_) => {
                let after = self.count() + (blocks.len() - plugged) as u64;
                let fits = after <= self.requested;
                self.set(&blocks, fits && !self.busy);
                match (fits, self.busy) {
                    (false, _) => Response::Nack,
                    (true, true) => Response::Busy,
                    (true, false) => Response::Ack,
                }
            }
            Request::Unplug(_) if !first && !all => Response::Error,
            Request::Unplug(_) => {
                self.set(&blocks, false);
                Response::Ack
            }
            _ if all => Response::State(BlockState::Plugged),
            _ if none => Response::State(BlockState::Unplugged),
            _ => Response::State(BlockState::Mixed),
        }
    }
}

fn any_run() -> impl Strategy<Value = BlockRun> {
    let near = (0..BLOCKS + 2, 0..4u16).prop_map(|(first, count)| {
        // One block below the region is possible, too.
        BlockRun { addr: ADDR + first * BLOCK - BLOCK, count }
    });
    let misaligned = (near.clone(), 1..BLOCK)
        .prop_map(|(run, by)| BlockRun { addr: run.addr + by, count: run.count });
    let anything = (any::<u64>(), any::<u16>());
    let anything = anything.prop_map(|(addr, count)| BlockRun { addr, count: count % 64 });
    prop_oneof![20 => near, 1 => misaligned, 1 => anything]
}

fn any_step() -> impl Strategy<Value = Step> {
    let request = prop_oneof![
        8 => any_run().prop_map(Request::Plug),
        6 => any_run().prop_map(Request::Unplug),
        4 => any_run().prop_map(Request::State),
        1 => Just(Request::UnplugAll),
        1 => (4u16..).prop_map(Request::Unknown),
    ];
    prop_oneof![
        20 => request.prop_map(Step::Request),
        4 => (0..BLOCKS + 2).prop_map(|blocks| Step::SetRequestedSize(blocks * BLOCK)),
        1 => any::<u64>().prop_map(Step::SetRequestedSize),
        4 => Just(Step::Connected),
        1 => Just(Step::Reset),
        2 => prop::bool::weighted(0.3).prop_map(Step::Job),
        2 => Just(Step::Moved),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn device_agrees_with_a_block_by_block_model(
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        let memory = Memory::new();
        let mut device = device(&memory, 0);
        let mut model = Model {
            plugged: vec![false; BLOCKS as usize],
            requested: 0,
            usable: 0,
            first: false,
            busy: false,
        };
        for step in steps {
            match step {
                Step::Request(request) => {
                    prop_assert_eq!(
                        device.process(request), model.answer(request), "{:?}", request,
                    );
                }
                Step::SetRequestedSize(size) => {
                    let valid = size % BLOCK == 0 && size / BLOCK <= BLOCKS;
                    let before = device.config();
                    let result = device.set_requested_size(size);
                    prop_assert_eq!(result.is_ok(), valid);
                    if valid {
                        model.requested = size / BLOCK;
                        model.usable = model.usable.max(model.needed());
                    }
                    prop_assert_eq!(result.unwrap_or(false), device.config() != before);
                }
                Step::Connected => {
                    device.connected();
                    model.first = true;
                }
                Step::Reset => {
                    device.reset();
                    model.first = false;
                }
                Step::Job(runs) => {
                    memory.busy.set(runs);
                    model.busy = runs;
                }
                Step::Moved => {
                    let state = device.save();
                    device = VirtioMem::new(REGION, &memory).unwrap();
                    device.load(&state).unwrap();
                    model.first = false;
                }
            }
            prop_assert_eq!(&memory.blocks(), &model.plugged);
            prop_assert_eq!(sizes(&device), (model.requested, model.usable, model.count()));
            prop_assert!(model.requested <= model.usable && model.usable <= BLOCKS);
            let outside = &model.plugged[model.usable as usize..];
            prop_assert!(!outside.contains(&true), "all plugged blocks are usable");
        }
    }
}
