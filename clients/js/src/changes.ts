/**
 * Makes of `fetch` a function to call at every change. It runs one fetch at a time: on a slow line, fetches that overtake or cancel each
 * other never end. What changes during a fetch goes into the next one, as does what a fetch that failed was for; null stands for everything.
 * The promise ends with the last of them, or the first that fails.
 */
export function oneAtATime<Id>(fetch: (assetIds: Id[] | null) => Promise<unknown>): (assetIds: readonly Id[] | null) => Promise<void> {
  let changed: Set<Id> | null | undefined // undefined: nothing
  let running: Promise<void> | null = null

  function add(assetIds: Iterable<Id> | null): void {
    changed = assetIds && changed !== null ? new Set([...changed ?? [], ...assetIds]) : null
  }

  async function begin(ids: Set<Id> | null): Promise<void> { await fetch(ids && [...ids]) }

  async function run(): Promise<void> {
    try {
      while (changed !== undefined) {
        const now: Set<Id> | null = changed
        changed = undefined
        await begin(now).catch((error: unknown) => { add(now); throw error })
      }
    } finally {
      running = null
    }
  }

  return (assetIds) => {
    add(assetIds)
    return running ??= run()
  }
}
