import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { AutotagError } from '../errors.js'
import type { Autotag } from '../index.js'
import type { Job, JobComplete, JobProgress } from '../types.js'
import { fetchingAnew } from './shared.js'

const MOST_LIVE = 50 // uploads that are asked for at once

/** An upload as messages tell it; the other fields are there once it was fetched. */
export type LiveJob = Pick<Job, 'job_id' | 'image_count' | 'completed' | 'failed' | 'progress' | 'eta'> & Partial<Job>

const ended = (job: LiveJob): boolean => Boolean(job.finished_at) || job.completed + job.failed >= job.image_count

/** What a message says of an upload. */
function told(message: JobProgress | JobComplete): Partial<LiveJob> & { job_id: string } {
  const { job_id, completed, failed, image_count, status } = message
  const rest = 'progress' in message ? { progress: message.progress, eta: message.eta } : { progress: 100, eta: null }
  return { job_id, completed, failed, image_count, ...status && { status }, ...rest }
}

/** Those that this page has begun and not yet fetched have no `created_at`. */
function newestFirst(jobs: LiveJob[]): LiveJob[] {
  const made = (job: LiveJob): number => job.created_at ? Date.parse(job.created_at) : Infinity
  return jobs.sort((a, b) => made(a) === made(b) ? 0 : made(b) - made(a))
}

/** A fetched upload with what was told while it was fetched: the answer may be from before that. */
function withTold<J extends LiveJob>(job: J, told: Partial<LiveJob> = {}): J {
  const newer = !job.finished_at && (told.completed ?? -1) + (told.failed ?? 0) >= job.completed + job.failed
  return newer ? { ...job, ...told } : { ...told, ...job }
}

/** A workspace's uploads that are not over, and those that have ended since. */
export class JobList {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #told = new Map<string, Partial<LiveJob>>() // since the last load began
  #users = 0 // that have come and gone
  #stop: (() => void) | null = null
  readonly refresh: () => Promise<void>

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.refresh = fetchingAnew(client, queryKey, () => this.load())
  }

  start(): void {
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => this.patch(told(message)),
      onJobComplete: (message) => this.patch({ ...told(message), finished_at: new Date().toISOString() }),
      onSync: () => { void this.refresh() },
      onUserChange: () => {
        this.#users++
        this.#told.clear()
        this.#client.setQueryData(this.#queryKey, [])
        setTimeout(() => { if (this.#stop && this.#autotag.status !== 'signed-out') void this.refresh() }) // also where no channel comes
      },
    })
  }

  stop(): void {
    this.#stop?.()
    this.#stop = null
  }

  get #shown(): LiveJob[] { return this.#client.getQueryData<LiveJob[]>(this.#queryKey) ?? [] }

  async load(): Promise<LiveJob[]> {
    this.#told.clear()
    const users = this.#users
    try {
      const live: LiveJob[] = await this.#autotag.jobs({ onlyLive: true, limit: MOST_LIVE })
      const fetched = [...live, ...await this.#others(live)]
      if (users !== this.#users) return await this.load() // these are the former user's
      const known = new Set(fetched.map((job) => job.job_id))
      const begun = this.#shown.filter((job) => !known.has(job.job_id) && this.#told.has(job.job_id))
      return newestFirst([...begun, ...fetched.map((job) => withTold(job, this.#told.get(job.job_id)))])
    } catch (error) {
      if (error instanceof AutotagError && error.code === 'PGRST202') return this.#shown // an older server has no tagging_jobs
      throw error
    }
  }

  /** What is shown and is not live. Those that have ended while no message came, and those known by messages alone, are fetched. */
  async #others(live: readonly LiveJob[]): Promise<LiveJob[]> {
    const ids = new Set(live.map((job) => job.job_id))
    const others = await Promise.all(this.#shown.filter((job) => !ids.has(job.job_id)).map(async (job) => {
      if (ended(job) && job.created_at || this.#told.has(job.job_id) || live.length >= MOST_LIVE) return job
      return await this.#autotag.job(job.job_id).catch((error: unknown) => {
        if (error instanceof AutotagError && error.code === 'unknown_job') return null
        throw error
      })
    }))
    return others.filter((job) => job !== null)
  }

  patch(change: Partial<LiveJob> & { job_id: string }): void {
    this.#told.set(change.job_id, { ...this.#told.get(change.job_id), ...change })
    this.#client.setQueryData<LiveJob[]>(this.#queryKey, (jobs = []) => {
      const known = jobs.some((job) => job.job_id === change.job_id)
      if (known) return jobs.map((job) => job.job_id === change.job_id ? { ...job, ...change } : job)
      return [{ image_count: 0, completed: 0, failed: 0, progress: 0, eta: null, ...change }, ...jobs]
    })
  }
}

/** One upload; null: none. */
export class OneJob {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #jobId: string | null
  #told: Partial<LiveJob> | undefined // since the last load began
  #stop: (() => void) | null = null
  readonly refresh: () => Promise<void>

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag, jobId: string | null) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.#jobId = jobId
    this.refresh = fetchingAnew(client, queryKey, () => this.load())
  }

  async load(): Promise<Job> {
    this.#told = undefined
    const job = await this.#autotag.job(this.#jobId!)
    return withTold(job, this.#told)
  }

  start(): void {
    if (this.#jobId === null) return
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => { if (message.job_id === this.#jobId) this.#patch(told(message)) },
      onJobComplete: (message) => {
        if (message.job_id !== this.#jobId) return
        this.#patch(told(message))
        void this.refresh()
      },
      onSync: () => { if (!this.#client.getQueryData<Job>(this.#queryKey)?.finished_at) void this.refresh() },
      onUserChange: () => {
        this.#told = undefined
        void this.#client.resetQueries({ queryKey: this.#queryKey, exact: true })
      },
    })
  }

  stop(): void { this.#stop?.() }

  #patch(change: Partial<LiveJob>): void {
    this.#told = { ...this.#told, ...change }
    this.#client.setQueryData<Job>(this.#queryKey, (job) => job && { ...job, ...change } as Job)
  }
}
